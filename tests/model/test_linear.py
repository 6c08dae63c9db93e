"""Products of few rows beside `F.linear`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import close, tiny_model, tokens_of

from fathom.model.linear import Linear, product
from fathom.model.native import kernels


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (1, 7), (2, 3), (64,), (65,), (5, 13), (0,)])
def test_a_product_is_linear(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(*shape, 11), torch.randn(17, 11)
    with torch.no_grad():
        y = product(x, weight)
        for given in (x, x.transpose(0, -2)):  # rows that do not follow each other in memory, too
            torch.testing.assert_close(product(given, weight), F.linear(given, weight))
    assert y.shape == (*shape, 17)
    assert y.is_contiguous()


def test_gradients_and_other_dtypes_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(11, 17), torch.randn(3, 11)
    monkeypatch.setattr(kernels, "product", None)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert product(x.double(), layer.weight.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(torch.randn(kernels.FEW + 1, 11)).shape == (kernels.FEW + 1, 17)
        with pytest.raises(TypeError):
            layer(x)


@pytest.mark.parametrize("fast", [False, True])
@torch.no_grad()
def test_weights_in_bfloat16(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """x stays float32. Many rows are multiplied in what the processor is fast at."""
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: fast)
    weight = torch.randn(17, 11).bfloat16()
    for rows in (1, kernels.FEW, kernels.FEW + 1):
        x = torch.randn(rows, 11)
        y, exact = product(x, weight), F.linear(x, weight.float())
        assert y.dtype == torch.float32
        assert close(y, exact, 1e-2)
        assert close(y, exact, 1e-6) == (rows <= kernels.FEW or not fast)
    assert product(x.bfloat16(), weight).dtype == torch.bfloat16  # by PyTorch


def test_few_rows() -> None:
    x = torch.zeros(())
    assert not kernels.few(x, 4)  # gradients
    with torch.no_grad():
        assert [kernels.few(x, rows) for rows in (0, 4, 64, 65)] == [False, True, True, False]
        assert not kernels.few(x.bfloat16(), 4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), rows=st.integers(1, 5), moe=st.sampled_from(["dense", "v2", "v3", "eager"]))
def test_a_model_answers_alike_with_and_without_gradients(seed: int, rows: int, moe: str) -> None:
    """The whole of inference beside the whole of training: products, norms, rotation, experts."""
    model, tokens = tiny_model("mla_low_rank", moe, seed=seed).eval(), tokens_of(rows, 7, seed)
    with torch.no_grad():
        fast = model(tokens)
    assert close(fast, model(tokens))
