"""A run in a dozen numbers: the headline of the page and what `fathom report --json` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathom.report.read import Column, Event, LayerLoad, RunTables


@dataclass(frozen=True)
class Summary:
    """None: not measured. Losses are nats a token; speeds are medians over rows, since a pause is not the machine's.

    max_vio        mean over layers of the MaxVio of the loads of `window` last steps together: one batch is noisy, and
                   its MaxVio never reaches 0. worst_max_vio: the largest over layers, in worst_layer
    dead_experts   experts of all layers that got no token in these steps
    """

    step: int | None
    tokens: int | None
    seconds: float | None
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    best_step: int | None
    val_bpb: float | None
    best_val_bpb: float | None
    tokens_per_second: float | None
    mfu: float | None
    max_vio: float | None
    worst_max_vio: float | None
    worst_layer: int | None
    window: int | None
    dead_experts: int | None
    skipped_steps: int
    resumes: int
    parameters: int | None
    active_parameters: int | None


def summarize(run: RunTables) -> Summary:
    """The numbers of a run."""
    metrics = run.metrics
    at_best = _lowest(metrics.val_loss)
    violations = {layer.layer: violation(late_load(layer)) for layer in run.experts}
    known = {layer: value for layer, value in violations.items() if value is not None}
    worst = max(known, key=lambda layer: known[layer]) if known else None
    return Summary(
        step=whole(last(metrics.step)),
        tokens=whole(last(metrics.tokens)),
        seconds=last(metrics.seconds),
        train_loss=last(metrics.train_loss),
        val_loss=last(metrics.val_loss),
        best_val_loss=None if at_best is None else float(metrics.val_loss[at_best]),
        best_step=None if at_best is None else int(metrics.step[at_best]),
        val_bpb=last(metrics.val_bpb),
        best_val_bpb=_at(metrics.val_bpb, _lowest(metrics.val_bpb)),
        tokens_per_second=_median(metrics.tokens_per_second),
        mfu=_median(metrics.mfu),
        max_vio=sum(known.values()) / len(known) if known else None,
        worst_max_vio=None if worst is None else known[worst],
        worst_layer=worst,
        window=max(map(late_steps, run.experts), default=None),
        dead_experts=sum(int((late_load(layer) == 0).sum()) for layer in run.experts) if known else None,
        skipped_steps=sum(map(is_skip, run.events)),
        resumes=len(resume_steps(run)),
        parameters=_count(run, "parameters"),
        active_parameters=_count(run, "active_parameters"),
    )


def is_skip(event: Event) -> bool:
    """A step that did not move the weights."""
    return event.kind.startswith("skipped")


def resume_steps(run: RunTables) -> list[int]:
    """Steps at which a session after the first began: the events say so, or the monitor's clock went back to 0."""
    told = [event.step for event in run.events if event.kind.startswith("resume")]
    back = np.flatnonzero(np.diff(run.hardware.seconds) < 0)
    return told or [int(step) for step in run.hardware.step[back]]


def late_steps(layer: LayerLoad) -> int:
    """Optimizer steps that `late_load` covers."""
    return int(layer.step[-1] - _edges(layer.step)[-_late_rows(layer) - 1])


def late_load(layer: LayerLoad) -> Column:
    """Shares (E,) of the last tenth of the rows (three at least), each row weighing by its steps."""
    rows = _late_rows(layer)
    steps, load = np.diff(_edges(layer.step))[-rows:], layer.load[-rows:]
    measured = ~np.isnan(load).any(axis=1)
    if not measured.any():
        return np.full(layer.experts, math.nan)
    total: Column = steps[measured] @ load[measured]
    return total / total.sum()


def violation(load: Column) -> float | None:
    """MaxVio = (max load - mean load) / mean load."""
    return None if np.isnan(load).any() else float(load.max() / load.mean() - 1)


def _late_rows(layer: LayerLoad) -> int:
    return min(len(layer.step), max(3, len(layer.step) // 10))


def _edges(step: Column) -> Column:
    """Row i tells of the steps after edge i up to edge i + 1; the first row of the steps from 1."""
    return np.concatenate([[0.0], step])


def last(column: Column) -> float | None:
    """The last value that was measured."""
    measured = column[np.isfinite(column)]
    return float(measured[-1]) if len(measured) else None


def whole(number: float | None) -> int | None:
    """A count, for which a table of floats has no type."""
    return None if number is None else int(number)


def _median(column: Column) -> float | None:
    measured = column[np.isfinite(column)]
    return float(np.median(measured)) if len(measured) else None


def _lowest(column: Column) -> int | None:
    return int(np.nanargmin(column)) if np.isfinite(column).any() else None


def _at(column: Column, place: int | None) -> float | None:
    return None if place is None else float(column[place])


def _count(run: RunTables, name: str) -> int | None:
    """A count that run.json or environment.json may hold, at the top or one level down."""
    for tree in (run.facts, run.environment):
        for branch in (tree, *_branches(tree)):
            value = branch.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _branches(tree: dict[str, Any]) -> Sequence[dict[str, Any]]:
    return [value for value in tree.values() if isinstance(value, dict)]
