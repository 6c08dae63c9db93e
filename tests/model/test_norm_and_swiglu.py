"""The hand-written backward passes beside their plain twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fathom.model.feedforward import FeedForward, swiglu, swiglu_plain, weighted_swiglu, weighted_swiglu_plain
from fathom.model.norm import RMSNorm, rms_norm_plain


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 17), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_norm_is_the_formula(rows: int, width: int, scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    norm = RMSNorm(width, eps=1e-5)
    norm.weight.data.normal_(1, 0.3, generator=draw)
    x = (torch.randn(2, rows, width, generator=draw) * scale).requires_grad_()
    pull = torch.randn(2, rows, width, generator=draw)
    y, twin = norm(x), rms_norm_plain(x, norm.weight, 1e-5)
    torch.testing.assert_close(y, twin)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, norm.weight), pull),
        torch.autograd.grad(twin, (x, norm.weight), pull),
        rtol=1e-4,
        atol=1e-5,
    )


def test_norm_agrees_with_finite_differences() -> None:
    norm = RMSNorm(7, eps=1e-3).double()
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))


def test_norm_of_narrow_numbers_is_computed_wide() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # the sum of squares overflows float16
    y = RMSNorm(64)(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y))


@pytest.mark.parametrize("train", [True, False])
def test_norm_answers_in_the_dtype_of_its_readers(train: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
        assert RMSNorm(5)(torch.randn(2, 5)).dtype == torch.bfloat16
    assert RMSNorm(5)(torch.randn(2, 5)).dtype == torch.float32


def test_swiglu_agrees_with_its_twin_and_finite_differences() -> None:
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(swiglu(gate, up), swiglu_plain(gate, up))
    assert gradcheck(swiglu, (gate, up))


def test_weighted_swiglu_agrees_with_its_twin_and_finite_differences() -> None:
    both = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(weighted_swiglu(both, weights), weighted_swiglu_plain(both, weights))
    with torch.no_grad():
        torch.testing.assert_close(weighted_swiglu(both, weights), weighted_swiglu_plain(both, weights))
    assert gradcheck(weighted_swiglu, (both, weights))


def test_feed_forward_is_swiglu() -> None:
    net = FeedForward(5, 11)
    x = torch.randn(3, 5)
    gate, up = x @ net.gate_proj.weight.T, x @ net.up_proj.weight.T
    torch.testing.assert_close(net(x), (gate * gate.sigmoid() * up) @ net.down_proj.weight.T)
