from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch_of, close, documents, tiny_model
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fathom.batch import IGNORE, Batch
from fathom.model.loss import (
    chunk_rows,
    cross_entropy_plain,
    head_cross_entropy,
    language_model_loss,
    scaled_cross_entropy,
)


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 5, generator=draw, dtype=dtype, requires_grad=True)
    weight = torch.randn(31, 5, generator=draw, dtype=dtype, requires_grad=True)
    targets = torch.randint(31, (23,), generator=draw)
    targets[[0, 7, 22]] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 4, 23, 100, None])
def test_chunks_are_the_plain_loss(chunk: int | None) -> None:
    hidden, weight, targets = case()
    fast, slow = head_cross_entropy(hidden, weight, targets, chunk), cross_entropy_plain(hidden, weight, targets)
    torch.testing.assert_close(fast, slow)
    for a, b in zip(*(torch.autograd.grad(3 * y, (hidden, weight)) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_chunks_agree_with_finite_differences() -> None:
    hidden, weight, targets = case(torch.float64)
    assert gradcheck(lambda h, w: head_cross_entropy(h, w, targets, 4), (hidden, weight))


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = case()
    loss = head_cross_entropy(hidden * 1e4, weight, targets)
    torch.testing.assert_close(loss, cross_entropy_plain(hidden * 1e4, weight, targets))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_is_float32_under_autocast(dtype: torch.dtype) -> None:
    hidden, weight, targets = case()
    with torch.autocast("cpu", dtype):
        loss = head_cross_entropy(hidden, weight, targets, 4)
    want = cross_entropy_plain(hidden.to(dtype).float(), weight.to(dtype).float(), targets)
    assert loss.dtype == torch.float32
    assert close(loss, want, 2e-3)
    for a, b in zip(*(torch.autograd.grad(y, (hidden, weight)) for y in (loss, want)), strict=True):
        assert a.dtype == torch.float32
        assert close(a, b, 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1 / 4096, 0.0])
def test_a_scaled_loss_has_scaled_gradients(dtype: torch.dtype, scale: float) -> None:
    hidden, weight, targets = case()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        scaled, total = scaled_cross_entropy(hidden, weight, targets, scale, 4)
        plain = head_cross_entropy(hidden, weight, targets, 4)
    assert not total.requires_grad
    torch.testing.assert_close(total, plain.detach())
    torch.testing.assert_close(scaled, total * scale)
    loss_scale = 4096.0  # as training in float16 multiplies the loss; without care its gradients would vanish before
    for a, b in zip(*(torch.autograd.grad(y * loss_scale, (hidden, weight)) for y in (scaled, plain)), strict=True):
        torch.testing.assert_close(a, b * scale, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6 * loss_scale)


def test_nothing_counts_when_every_target_is_ignored() -> None:
    hidden, weight, targets = case()
    loss = head_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE), 4)
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


class Largest(TorchDispatchMode):
    """Sees every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for made in out if isinstance(out, tuple | list) else (out,):
            self.numbers = max(self.numbers, made.numel() if isinstance(made, Tensor) else 0)
        return out


def test_logits_never_stand_whole() -> None:
    hidden, weight, targets = (
        torch.randn(512, 4, requires_grad=True),
        torch.randn(300, 4, requires_grad=True),
        torch.arange(512) % 300,
    )
    with Largest() as seen:
        head_cross_entropy(hidden, weight, targets, 64).backward()
    assert seen.numbers == 64 * 300
    assert chunk_rows(50257) * 50257 < 1 << 24
    with Largest() as seen, torch.no_grad():
        head_cross_entropy(hidden, weight, targets, 64)
    assert seen.products == 8  # logits alone, no gradients


@pytest.mark.parametrize("moe", ["dense", "v3", "batch_loss"])
@pytest.mark.parametrize("tied", [False, True])
def test_total_is_the_sum_of_its_parts(moe: str, tied: bool) -> None:
    model, batch = tiny_model(moe=moe, depths=2, tie_word_embeddings=tied), documents([[5, 4], [9, 2]], padded_to=11)
    losses = language_model_loss(model, batch, token_count=50, batch_share=0.25, mtp_weight=0.3)
    with torch.no_grad():
        logits = model(batch.tokens, batch.positions, batch.segments)
    want = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(losses.next_token, want)
    assert int(losses.tokens) == batch.target_count
    assert losses.mtp.shape == losses.mtp_tokens.shape == (2,)
    torch.testing.assert_close(
        losses.total.detach(), losses.next_token / 50 + 0.3 / 2 * losses.mtp.sum() / 50 + 0.25 * losses.balance
    )
    assert not any(x.requires_grad for x in (losses.next_token, losses.mtp, losses.balance))
    assert (losses.balance > 0) == (moe != "dense")
    assert [r.layer for r in losses.routing] == ([] if moe == "dense" else [1, 2, 3])


def test_accumulation_weighs_every_token_alike() -> None:
    model, whole = tiny_model(moe="eager"), documents([[5, 4], [2, 2], [11]], padded_to=11)

    def gradients(batches: list[Batch]) -> list[Tensor]:
        model.zero_grad()
        for b in batches:
            language_model_loss(model, b, token_count=whole.target_count, batch_share=len(b) / 3).total.backward()
        return [w.grad for w in model.parameters() if w.grad is not None]

    parts = [Batch(*(getattr(whole, f)[rows] for f in ("tokens", "targets", "positions", "segments")))  # type: ignore[arg-type]
             for rows in (slice(0, 1), slice(1, 3))]  # fmt: skip
    assert parts[0].target_count != parts[1].target_count
    for a, b in zip(gradients(parts), gradients([whole]), strict=True):
        assert close(a, b, 1e-4)


def test_defaults_are_this_batch_alone() -> None:
    model, batch = tiny_model(moe="dense", depths=0), batch_of()
    losses = language_model_loss(model, batch)
    torch.testing.assert_close(losses.total.detach(), losses.next_token / batch.target_count)
    assert losses.mtp.numel() == losses.mtp_tokens.numel() == len(losses.routing) == 0


# Made by this code on 24 November 2026: a change of the equations shows here even if the twins change alike.
GOLDEN = {
    ("gqa", "seed"): 4.609621,
    ("mla", "v2"): 4.649375,
    ("mla_low_rank", "v3"): 4.993104,
    ("mla_yarn", "batch_loss"): 4.715926,
}


@pytest.mark.parametrize(("attention", "moe"), GOLDEN)
def test_golden_losses(attention: str, moe: str) -> None:
    losses = language_model_loss(tiny_model(attention, moe), batch_of())
    assert float(losses.total.detach()) == pytest.approx(GOLDEN[attention, moe], abs=2e-5)
