"""Named streams of one seed, and the generators' state that safetensors can hold."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fathom.runtime.seed import capture, generator, restore, seed_everything, stream


def test_a_stream_is_what_it_always_was() -> None:
    # golden: runs of years ago must be able to go on
    assert stream(0, "init") == 1519069808562059438
    assert stream(1, "data", 3) == 4116872360819796836
    assert len({stream(1, "data", 3), stream(1, "data", 4), stream(2, "data", 3), stream(1, "data")}) == 4


@given(st.integers(0, 2**63), st.text("abcxyz", min_size=1), st.integers(0, 10**6))
def test_streams_fit_a_generator(seed: int, name: str, number: int) -> None:
    value = stream(seed, name, number)
    assert 0 <= value < 2**63
    draws = [torch.rand(3, generator=generator(seed, name, number)) for _ in range(2)]
    assert torch.equal(*draws)


def draw() -> list[float]:
    return [*torch.rand(3).tolist(), random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn()]  # noqa: NPY002


def test_captured_state_survives_a_file(tmp_path: Path) -> None:
    seed_everything(3, "dropout")
    draw()  # leaves half a pair of Gaussians behind in Python and numpy
    save_file(capture(), tmp_path / "rng.safetensors")
    first = draw()
    assert draw() != first
    restore(load_file(tmp_path / "rng.safetensors"))
    assert draw() == first
