"""Guards and the loss scale."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fathom.errors import TrainingError
from fathom.train.guards import Guard, GuardsConfig, LossScaler


def guard(scale: float | None = None, **knobs: Any) -> Guard:
    return Guard(GuardsConfig(**knobs), LossScaler(scale or 1.0, interval=3, enabled=scale is not None))


def test_good_steps_pass_and_bad_ones_say_why() -> None:
    own = guard()
    assert own.judge(1, 2.0, 1.0) is None
    assert own.judge(2, math.nan, 1.0) == "loss not finite"
    assert own.judge(3, 2.0, math.inf) == "gradient not finite"
    assert (own.in_a_row, own.total) == (2, 2)
    assert own.judge(4, 2.0, 1.0) is None
    assert (own.in_a_row, own.total) == (0, 2)


def test_it_stops_after_so_many_in_a_row() -> None:
    own = guard(max_skipped=3)
    for step in (1, 2):
        own.judge(step, math.nan, 1.0)
    with pytest.raises(TrainingError, match=r"step 3: loss not finite.*optimizer\.lr"):
        own.judge(3, math.nan, 1.0)


def test_a_spike_is_measured_by_the_median() -> None:
    own = guard(spike_factor=4.0, spike_window=5)
    for step, norm in enumerate([100.0, 1.0, 1.1, 0.9, 1.0]):  # no spike before the window is full
        assert own.judge(step, 1.0, norm) is None
    assert own.judge(6, 1.0, 4.5) == "gradient spike"
    assert own.judge(7, 1.0, 3.9) is None


def test_the_loss_scale_falls_at_overflow_and_rises_after_good_steps() -> None:
    own = guard(scale=8.0, max_skipped=1)
    for want in (4.0, 2.0, 1.0):  # searching is not counted, however long it takes
        assert own.judge(1, 1.0, math.inf) == "overflow"
        assert own.scaler.scale == want
    for _ in range(3):
        assert own.judge(2, 1.0, 1.0) is None
    assert own.scaler.scale == 2.0
    own.scaler.scale = 1.0
    with pytest.raises(TrainingError, match="gradient not finite"):  # at scale 1 it is no search any more
        own.judge(3, 1.0, math.inf)


def test_state_goes_round() -> None:
    own = guard(scale=64.0, spike_factor=3.0, spike_window=3)
    for step in range(5):
        own.judge(step, 1.0, 1.0 + step / 7)
    own.judge(6, 1.0, math.inf)
    again = guard(scale=1.0, spike_factor=3.0, spike_window=3)
    again.load_state_dict(own.state_dict())
    assert again == own


def test_another_arithmetic_keeps_its_own_scale() -> None:
    half = guard(scale=1024.0)
    half.load_state_dict(guard().state_dict())
    assert half.scaler.scale == 1024.0
    full = guard()
    full.load_state_dict(guard(scale=1024.0).state_dict())
    assert full.scaler.scale == 1.0
