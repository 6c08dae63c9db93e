"""Products of few rows beside `F.linear`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import close, tiny_model, tokens_of

from fathom.model import linear
from fathom.model.linear import Linear, product, turns


@pytest.fixture
def always_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are multiplied as large ones are."""
    monkeypatch.setattr(linear, "LEAST", 1)
    monkeypatch.setattr(linear, "LEAST_ALONE", 1)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets them, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("always_turned")
@pytest.mark.parametrize("count", [1, 2, 3, 19])
@pytest.mark.parametrize("height", [1, 17, 18])
def test_one_row_is_shared_out(count: int, height: int, threads: Callable[[int], None]) -> None:
    threads(count)
    x, weight = torch.randn(22)[::2], torch.randn(height, 11)
    with torch.no_grad():
        for given in (x, x[None], x.view(1, 1, 11)):
            y = product(given, weight)
            torch.testing.assert_close(y, F.linear(given, weight))
            assert y.is_contiguous()


@pytest.mark.usefixtures("always_turned")
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (1, 7), (2, 3), (64,), (65,), (5, 13), (0,)])
def test_a_product_is_linear(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(*shape, 11), torch.randn(17, 11)
    with torch.no_grad():
        y = product(x, weight)
        for given in (x, x.transpose(0, -2)):  # rows that do not follow each other in memory, too
            torch.testing.assert_close(product(given, weight), F.linear(given, weight))
    assert y.shape == (*shape, 17)
    assert y.is_contiguous()


@pytest.mark.usefixtures("always_turned")
def test_gradients_and_other_dtypes_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(11, 17), torch.randn(3, 11)
    monkeypatch.setattr(torch, "mm", None)  # what a turned product calls
    assert layer(x).requires_grad
    with torch.no_grad():
        assert product(x.double(), layer.weight.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with pytest.raises(TypeError):
            layer(x)


def test_small_matrices_and_many_rows_are_not_turned(threads: Callable[[int], None]) -> None:
    large = 1 << 20
    assert [turns(rows, large) for rows in (1, 2, 64, 65)] == [False, True, True, False]
    assert not turns(4, 400)
    threads(1)
    assert not turns(4, large // 2)
    threads(2)
    assert turns(4, large // 2)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), rows=st.integers(1, 5), moe=st.sampled_from(["dense", "v2", "v3", "eager"]))
def test_a_model_answers_alike_with_and_without_gradients(seed: int, rows: int, moe: str) -> None:
    """The whole of inference beside the whole of training: products, norms, rotation, experts."""
    model, tokens = tiny_model("mla_low_rank", moe, seed=seed).eval(), tokens_of(rows, 7, seed)
    patch = pytest.MonkeyPatch()
    with patch.context() as turned, torch.no_grad():
        turned.setattr(linear, "LEAST", 1)
        turned.setattr(linear, "LEAST_ALONE", 1)
        fast = model(tokens)
    assert close(fast, model(tokens))
