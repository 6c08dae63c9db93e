"""The whole model: gradients by finite differences, learning, narrow numbers, compilation."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_models import ATTENTIONS, MOES, batch_of, close, documents, tiny_model
from torch import Tensor

from fathom.model.loss import language_model_loss
from fathom.model.transformer import Transformer

EVERY = [(a, m) for a in ATTENTIONS for m in MOES]


@pytest.mark.parametrize(("attention", "moe"), EVERY)
def test_gradients_agree_with_finite_differences(attention: str, moe: str) -> None:
    """In float64, along a random direction of each weight; the choice of experts, which has no gradient, does not
    move."""
    model, batch = tiny_model(attention, moe, depths=1).double(), documents([[6, 4], [7]], padded_to=11)
    language_model_loss(model, batch, batch_share=0.7).total.backward()
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        direction = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        direction /= direction.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * 1e-5)
                ends.append(float(language_model_loss(model, batch, batch_share=0.7).total))
                weight.add_(direction, alpha=-sign * 1e-5)
        slope = float((weight.grad * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize(("attention", "moe"), EVERY)
def test_one_batch_is_learnt_by_heart(attention: str, moe: str) -> None:
    model, batch = tiny_model(attention, moe, depths=1, hidden_size=40, initializer_range=0.1), batch_of(2, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    mean = float("inf")
    for step in range(150):
        losses = language_model_loss(model, batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        model.balance_step({r.layer: r.counts for r in losses.routing}, step / 150)
        mean = float(losses.next_token) / int(losses.tokens)
        if mean < 0.05:
            break
    assert mean < 0.05


@pytest.mark.parametrize(("attention", "moe"), EVERY)
def test_autocast_is_near_float32(attention: str, moe: str) -> None:
    model, batch = tiny_model(attention, moe, depths=1, initializer_range=0.1), documents([[6, 4], [7]], padded_to=11)
    exact = language_model_loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = language_model_loss(model, batch)
    narrow.total.backward()
    assert narrow.total.dtype == torch.float32
    assert close(narrow.total.detach(), exact.total.detach(), 2e-2)
    assert all(
        w.grad is not None and w.grad.dtype == torch.float32 and w.grad.isfinite().all() for w in model.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_answers(dtype: torch.dtype) -> None:
    model, batch = tiny_model(initializer_range=0.1).eval(), batch_of()
    want = model(batch.tokens)
    got = model.to(dtype)(batch.tokens)
    assert got.dtype == dtype
    assert close(got.float(), want, 0.1)


def compare_compiled(model: Transformer, backend: str, narrow: bool) -> None:
    torch._dynamo.reset()
    batch = batch_of()

    def gradients() -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            total = language_model_loss(model, batch).total
        return total.detach(), list(torch.autograd.grad(total, list(model.parameters())))

    plain, grads = gradients()
    model.run_block = torch.compile(model.run_block, dynamic=False, backend=backend)
    compiled, others = gradients()
    assert close(compiled, plain, 1e-2 if narrow else 1e-5)
    assert all(close(a, b, 0.2 if narrow else 1e-3) for a, b in zip(others, grads, strict=True))


@pytest.mark.parametrize(("attention", "moe"), [("gqa", "dense"), ("mla_low_rank", "v3")])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_traced_block_is_the_same(attention: str, moe: str, narrow: bool) -> None:
    compare_compiled(tiny_model(attention, moe, depths=1, initializer_range=0.1), "aot_eager", narrow)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(c) for c in ("g++", "clang++", "c++")), reason="torch.compile needs a C++ compiler"
)
def test_a_compiled_block_is_the_same() -> None:
    moe = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 12, "scoring_func": "sigmoid"}
    compare_compiled(tiny_model("mla", moe, depths=0, num_hidden_layers=1, initializer_range=0.1), "inductor", False)
