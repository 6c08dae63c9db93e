"""int8 weights: how far off they may be, and what a model with them does and refuses."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import GrowingCache, batch_of, close, tiny_model, tokens_of
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.model.loss import language_model_loss
from fathom.model.native import kernels
from fathom.model.quantize import (
    Int8,
    Int8Embedding,
    Int8Experts,
    Int8Linear,
    by_blocks,
    quantize_int8,
    quantized,
    rebuilt,
)
from fathom.model.transformer import Transformer


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 33),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_no_weight_is_off_by_more_than_half_a_step(rows: int, width: int, scale: float, seed: int) -> None:
    weight = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed)) * scale
    weight[0, 0] = 0.0
    q, steps = quantized(weight)
    assert (q.dtype, steps.dtype) == (torch.int8, torch.float32)
    assert int(q.abs().max()) <= 127
    off = (rebuilt(q, steps) - weight).abs()
    assert (off <= 0.5001 * steps.unsqueeze(-1)).all()


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("width", [32, 20, 200])  # whole vectors, and not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_with_what_it_rounded(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width).to(dtype)
    layer = Int8Linear(torch.randn(19, width))
    exact = x.double() @ layer.dense().double().T
    slow = layer(x)  # gradients are on: no kernel
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == slow.dtype == dtype
    for got in (y, slow):
        assert close(got.double(), exact, 2**-8 if dtype == torch.bfloat16 else 1e-4)


def test_blocks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, scale = quantized(torch.randn(19, 7))
    x = torch.randn(5, 7)
    monkeypatch.setattr("fathom.model.quantize.BLOCK", 7 * 4)
    torch.testing.assert_close(by_blocks(x, q, scale), x @ rebuilt(q, scale).T)


SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.1}
MLA32 = {"kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
         "v_head_dim": 16}  # fmt: skip
MOE32 = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
         "n_shared_experts": 1, "scoring_func": "sigmoid"}  # fmt: skip


@cache
def trained() -> Transformer:
    """It knows a few rows by heart."""
    model, batch = tiny_model(MLA32, MOE32, **SIZES), batch_of(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        language_model_loss(model, batch).total.backward()
        optimizer.step()
    return model.eval()


def continued(model: Transformer, tokens: Tensor, length: int) -> Tensor:
    """Greedy tokens (B, length)."""
    caches, found = [GrowingCache() for _ in model.layers], []
    with torch.inference_mode():
        for _ in range(length):
            hidden = model.trunk(tokens, caches=caches).hidden[:, -1]
            tokens = model.logits(hidden).argmax(-1, keepdim=True)
            found.append(tokens)
    return torch.cat(found, dim=1)


def test_a_trained_model_says_the_same() -> None:
    model, prompts = trained(), batch_of(4, 24).tokens
    small = quantize_int8(copy.deepcopy(model))
    with torch.no_grad():
        a, b = (m(prompts).log_softmax(-1) for m in (model, small))
    assert float((a.exp() * (a - b)).sum(-1).mean()) < 5e-3  # nats
    want, got = (continued(m, prompts[:, :4], 20) for m in (model, small))
    assert (want == got).float().mean() > 0.95
    alone = torch.cat([continued(small, row, 20) for row in prompts[:, :4].split(1)])
    assert torch.equal(alone, got)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", ["gqa", "mla_low_rank"])
@pytest.mark.parametrize("moe", ["dense", "v2", "v3", "eager"])
def test_every_matrix_is_in_int8(attention: str, moe: str, tied: bool) -> None:
    model = tiny_model(attention, moe, tie_word_embeddings=tied).eval()
    tokens, want = tokens_of(2, 7), {}
    with torch.no_grad():
        want = {rows: model(tokens.repeat(rows, 1)) for rows in (1, 3)}
    assert quantize_int8(model) is model
    assert not any(weight.requires_grad for weight in model.parameters())
    left = {name.split(".", 2)[-1] for name, _ in model.named_parameters() if "norm" not in name}
    assert {name.rsplit(".", 2)[-2] for name in left} <= {"kv_b_proj", "gate"}
    kinds = {type(module) for module in model.modules() if isinstance(module, Int8)}
    assert kinds == {Int8Embedding, Int8Linear}
    assert not any(
        isinstance(module, nn.Linear | nn.Embedding) for name, module in model.named_modules() if "kv_b" not in name
    )
    assert any(isinstance(module, Int8Experts) for module in model.modules()) == (moe != "dense")
    with torch.no_grad():
        for rows, logits in want.items():
            assert close(model(tokens.repeat(rows, 1)), logits, 0.1)
        hidden, _ = model.look_ahead(1, torch.randn(2, 6, 20), tokens[:, 1:], torch.arange(6).expand(2, 6), None)
        assert close(model.logits(hidden[0, -1]), model.logits(hidden)[0, -1], 1e-5)  # one place, as (D)
    assert hidden.isfinite().all()


def test_what_others_ask_a_weight_about_is_still_answered() -> None:
    model = tiny_model(tie_word_embeddings=True).eval()
    matrix = model.head_weight.detach().clone()
    quantize_int8(model)
    like = model.embed_tokens.weight
    assert (like.shape, like.dtype, like.device) == (matrix.shape, matrix.dtype, matrix.device)
    assert like.isnan().all()
    assert close(model.head_weight, matrix, 0.005)
    with torch.no_grad():
        assert close(model.embed_tokens(torch.tensor([[3, 5]])), matrix[[3, 5]].unsqueeze(0), 0.005)


@pytest.mark.parametrize("moe", ["dense", "v3"])
def test_without_kernels_it_says_nearly_the_same(moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = quantize_int8(tiny_model("mla", moe).eval()), tokens_of(2, 7)
    with torch.no_grad():
        fast = model(tokens)
        monkeypatch.setattr(kernels, "serve", lambda x: False)
        assert close(fast, model(tokens), 1e-3)


def test_a_model_in_bfloat16_can_be_quantized() -> None:
    model = quantize_int8(tiny_model().bfloat16().eval())
    with torch.no_grad():
        assert model(tokens_of(2, 5)).dtype == torch.float32


def test_the_old_weights_are_freed() -> None:
    model = tiny_model(MLA32, MOE32, **{**SIZES, "vocab_size": 997, "tie_word_embeddings": True}).eval()
    before = sum(w.numel() * w.element_size() for w in model.parameters())
    quantize_int8(model)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(model)}
    assert sum(held.values()) < 0.5 * before


def tensors(part: Any) -> list[Tensor]:
    """Everything that a module holds, registered or not."""
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, nn.Module):
        return tensors(vars(part))
    values = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
    return [t for value in values for t in tensors(value)]


def test_what_makes_no_sense_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=r"training mode.*eval"):
        quantize_int8(model.train())
    assert not any(isinstance(module, Int8) for module in model.modules())
    quantize_int8(model.eval())
    with pytest.raises(UserError, match="already"):
        quantize_int8(model)
    with pytest.raises(UserError, match="cannot be trained"):
        model.train()
    for part in (model, model.layers[0]):
        with pytest.raises(UserError, match="cannot be saved or exported"):
            part.state_dict()
    with pytest.raises(UserError, match="on meta"):
        quantize_int8(tiny_model().eval().to("meta"))


def test_a_copy_answers_too() -> None:
    model = quantize_int8(tiny_model(tie_word_embeddings=True).eval())
    tokens = tokens_of(1, 5)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))
