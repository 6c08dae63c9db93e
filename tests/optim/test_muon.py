"""Muon: singular values as DeepSeek-V4's recipe gives them, experts each by themselves, and the update by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.optim.muon import EXACT, FAST, Muon, coefficients, orthogonalize


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (97, 31), (7, 7)])
def test_singular_values_are_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(matrix(*shape)).double())
    # a square random matrix has singular values near 0, which ten steps cannot lift all the way
    values = values if shape[0] != shape[1] else values[: shape[0] * 7 // 8]
    assert values.min() > 0.9999
    assert values.max() < (1.001 if shape[0] == shape[1] else 1.0006)


def test_singular_values_of_the_fast_steps_alone_stay_between_0_68_and_1_13() -> None:
    # facts: ten steps of the first triple alone do not converge; the last two are what makes them one
    values = torch.linalg.svdvals(matrix(64, 96).double())
    x = values / values.norm()
    for _ in range(10):
        a, b, c = FAST
        x = a * x + b * x**3 + c * x**5
    assert 0.67 < x.min() < x.max() < 1.14
    assert x.max() - x.min() > 0.05


def test_five_steps_are_nearly_as_orthogonal() -> None:
    assert coefficients(10) == (FAST,) * 8 + (EXACT,) * 2
    assert coefficients(5) == (FAST,) * 4 + (EXACT,)
    values = torch.linalg.svdvals(orthogonalize(matrix(64, 96), steps=5).double())
    assert 0.6 < values.min() < values.max() < 1.2
    weight = torch.zeros(24, 60, requires_grad=True)
    weight.grad = matrix(24, 60)
    Muon([weight], lr=1.0, weight_decay=0.0, steps=5).step()
    want = -orthogonalize(1.95 * matrix(24, 60), steps=5) * 60**0.5 * 0.18
    torch.testing.assert_close(weight.detach(), want)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_stack_is_each_matrix_by_itself(experts: int, n: int, m: int, seed: int) -> None:
    stack = matrix(experts, n, m, seed=seed)
    each = torch.stack([orthogonalize(one) for one in stack])
    torch.testing.assert_close(orthogonalize(stack), each, rtol=1e-4, atol=1e-5)


def test_singular_vectors_are_kept_and_zero_stays_zero() -> None:
    x = matrix(5, 11)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(orthogonalize(x), u @ vh, rtol=1e-3, atol=1e-3)
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def test_bfloat16_is_near() -> None:
    values = torch.linalg.svdvals(orthogonalize(matrix(48, 96), torch.bfloat16).double())
    assert 0.97 < values.min() < values.max() < 1.03


def test_two_updates_by_hand() -> None:
    start, lr, mu, decay, rms = matrix(3, 5, 7), 0.1, 0.95, 0.2, 0.18
    weight = start.clone().requires_grad_()
    optimizer = Muon([weight], lr, mu, decay, rms)
    want, momentum = start.clone(), torch.zeros(3, 5, 7)
    for step in range(2):
        weight.grad = matrix(3, 5, 7, seed=step + 1)
        optimizer.step()
        momentum = mu * momentum + weight.grad
        for e in range(3):
            update = orthogonalize(mu * momentum[e] + weight.grad[e]) * 7**0.5 * rms
            want[e] = want[e] * (1 - lr * decay) - lr * update
    torch.testing.assert_close(weight.detach(), want, rtol=1e-5, atol=1e-6)


def test_an_update_has_the_promised_rms() -> None:
    weight = torch.zeros(24, 60, requires_grad=True)
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0)
    weight.grad = matrix(24, 60)
    optimizer.step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.18, rel=1e-3)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.zeros(3, requires_grad=True)], lr=0.1)
