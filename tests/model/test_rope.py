from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from fathom.model.rope import Rope, YarnConfig, inverse_frequencies, softmax_scale

CPU = torch.device("cpu")


def turned(x: torch.Tensor, position: int, theta: float = 100.0) -> torch.Tensor:
    return Rope.at(torch.tensor([[position]]), x.numel(), theta, None).turn(x.view(1, 1, 1, -1)).flatten()


def test_neighbours_are_a_pair() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    want = []
    for pair, frequency in (((1.0, 2.0), 1.0), ((3.0, 4.0), 0.1)):
        c, s = math.cos(5 * frequency), math.sin(5 * frequency)
        want += [pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c]
    torch.testing.assert_close(turned(x, 5), torch.tensor(want))


@settings(max_examples=25, deadline=None)
@given(at=st.integers(0, 500), apart=st.integers(0, 500), shift=st.integers(0, 500), seed=st.integers(0, 99))
def test_scores_depend_on_the_distance_alone(at: int, apart: int, shift: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 10, generator=draw)
    one = turned(q, at + apart) @ turned(k, at)
    other = turned(q, at + apart + shift) @ turned(k, at + shift)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_yarn_is_that_of_deepseek_v3() -> None:
    plain = inverse_frequencies(64, 10000.0, None, CPU)
    yarn = inverse_frequencies(64, 10000.0, YarnConfig(factor=40.0), CPU)
    torch.testing.assert_close(yarn[:11], plain[:11])  # low = 10
    torch.testing.assert_close(yarn[23:], plain[23:] / 40)  # high = 23
    ratio = yarn[11:23] / plain[11:23]
    assert (ratio < 1).all()
    assert (ratio > 1 / 40).all()
    assert (ratio.diff() < 0).all()


@pytest.mark.parametrize(("m", "scale"), [(0.707, 0.1147214), (1.0, 0.1352338)])
def test_softmax_scale_of_released_models(m: float, scale: float) -> None:
    assert softmax_scale(192, YarnConfig(factor=40.0, mscale=m, mscale_all_dim=m)) == pytest.approx(scale, abs=1e-7)
    assert softmax_scale(192, None) == 192**-0.5


def test_a_model_in_bfloat16_keeps_exact_angles() -> None:
    model = tiny_model("mla_yarn")
    positions = torch.arange(30)[None]
    before = model.rope(positions).cos
    assert torch.equal(model.to(torch.bfloat16).rope(positions).cos, before)
    assert before.dtype == torch.float32
    assert {name.rsplit(".", 1)[1] for name, _ in model.named_buffers()} == {"e_score_correction_bias"}
