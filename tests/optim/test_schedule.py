"""Schedules: equal to torch where torch has them, and by hand where not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fathom.optim.schedule import (
    CosineConfig,
    LinearConfig,
    MultiStepConfig,
    OneCycleConfig,
    SchedulerConfig,
    WSDConfig,
    build_schedule,
)

EVERY: list[dict[str, Any]] = [
    {"kind": "one_cycle"},
    {"kind": "cosine", "warmup_steps": 3},
    {"kind": "wsd", "warmup_steps": 3, "decay_fraction": 0.5},
    {"kind": "linear"},
    {"kind": "constant", "warmup_steps": 5},
    {"kind": "multi_step", "milestones": [0.6, 0.9]},
]
parse = TypeAdapter(SchedulerConfig).validate_python


def torch_one_cycle(total: int, peak: float, **knobs: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=total, cycle_momentum=False, **knobs)
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            schedule.step()
    return rates


def assert_equal_to_torch(total: int, pct: float, div: float, final: float, shape: str) -> None:
    config = OneCycleConfig(pct_start=pct, div_factor=div, final_div_factor=final, anneal_strategy=shape)  # type: ignore[arg-type]
    factor = build_schedule(config, total, 2e-3)
    want = torch_one_cycle(total, 2e-3, pct_start=pct, div_factor=div, final_div_factor=final, anneal_strategy=shape)
    for step, rate in enumerate(want):
        assert abs(2e-3 * factor(step) - rate) < 1e-12 * 2e-3 + 1e-18, (step, rate)


def test_one_cycle_of_the_seed_is_that_of_torch() -> None:
    assert_equal_to_torch(1000, 0.02, 25.0, 1000.0, "cos")


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 60),
    st.floats(0.0, 1.0),
    st.floats(1.5, 100),
    st.floats(1.5, 1e5),
    st.sampled_from(["cos", "linear"]),
)
def test_one_cycle_is_that_of_torch(total: int, pct: float, div: float, final: float, shape: str) -> None:
    top = pct * total - 1
    if abs(top) < 1e-9 or abs(top - (total - 1)) < 1e-9:  # torch divides by 0
        pct = 0.3
    assert_equal_to_torch(total, pct, div, final, shape)


def test_one_cycle_where_torch_divides_by_zero() -> None:
    assert build_schedule(OneCycleConfig(pct_start=0.1), 10, 1.0)(0) == 1.0
    assert build_schedule(OneCycleConfig(pct_start=1.0), 10, 1.0)(9) == 1.0
    assert build_schedule(OneCycleConfig(), 1, 1.0)(0) > 0


def test_max_lr_of_one_cycle_stands_above_the_optimizers() -> None:
    assert max(map(build_schedule(OneCycleConfig(max_lr=3e-3), 50, 1e-3), range(50))) == pytest.approx(3.0)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c["kind"])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 101])
def test_every_schedule_is_finite_and_at_most_one(config: dict[str, Any], total: int) -> None:
    factor = build_schedule(parse(config), total, 1e-3)
    values = [factor(step) for step in range(total + 3)]
    assert all(math.isfinite(v) and 0 <= v <= 1 for v in values)
    assert values[0] > 0  # no step of a run is wasted
    assert values[total - 1] > 0
    assert max(values) > 0.95 or total < 7


@pytest.mark.parametrize("config", [c for c in EVERY if c["kind"] != "one_cycle"], ids=lambda c: c["kind"])
def test_warm_up_is_a_line(config: dict[str, Any]) -> None:
    factor = build_schedule(parse({**config, "warmup_steps": 4}), 100, 1e-3)
    assert [factor(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_by_hand() -> None:
    cosine = build_schedule(CosineConfig(kind="cosine", final_factor=0.2), 10, 1.0)
    assert [round(cosine(s), 12) for s in (0, 5, 10)] == [1.0, 0.6, 0.2]
    linear = build_schedule(LinearConfig(kind="linear", final_factor=0.5), 5, 1.0)
    assert [linear(s) for s in range(6)] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    wsd = build_schedule(WSDConfig(kind="wsd", decay_fraction=0.5), 8, 1.0)
    assert [wsd(s) for s in range(8)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    root = build_schedule(WSDConfig(kind="wsd", decay_fraction=0.5, shape="sqrt"), 8, 1.0)
    assert root(5) == 1 - 0.25**0.5
    deepseek = build_schedule(MultiStepConfig(kind="multi_step"), 10, 1.0)
    assert [round(deepseek(s), 6) for s in (7, 8, 9)] == [1.0, 0.316, 0.099856]


@pytest.mark.parametrize("milestones", [[0.9, 0.8], [0.5, 0.5], [0.0], [1.0]])
def test_impossible_milestones_are_refused(milestones: list[float]) -> None:
    with pytest.raises(ValidationError, match="milestones"):
        parse({"kind": "multi_step", "milestones": milestones})
