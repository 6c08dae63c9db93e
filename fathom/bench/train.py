"""`fathom bench train`: the same weights, the same rows, an optimizer step for so many tokens, in turns.

    MFU = tokens a second x useful FLOP a token / the machine's product rate         (`model/cost.py`, `machine.py`)

Recomputation, padding and lookups are no useful FLOP, for nobody. A contestant's memory is what its process needs above
the parameter state (weights, gradients and moments in float32: 16 bytes a weight) and its libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fathom.bench.contestants import OURS, Entry
from fathom.bench.lanes import Field, Key, Lane
from fathom.bench.machine import Machine, Surroundings, measured
from fathom.bench.material import Material
from fathom.bench.spread import Spread, ratios
from fathom.errors import ConfigError
from fathom.optim.build import AdamWConfig

ROWS = 64  # different rows at least; then they come again


@dataclass(frozen=True)
class TrainBench:
    """precisions: arithmetics, each against its like; rounds: turns of every contestant, a step each; warm_up: steps
    before; tokens: of an optimizer step; slow: seconds that a step may take before its contestant is left out."""

    precisions: tuple[str, ...] = ("float32",)
    rounds: int = 5
    warm_up: int = 2
    tokens: int = 2048
    slow: float = 120.0
    quick: bool = False


def bench(
    material: Material, peers: Sequence[Entry], left_out: dict[str, str], around: Surroundings, plan: TrainBench
) -> dict[str, Any]:
    """Everything that was measured, for JSON and `show.train`. ConfigError: an optimizer that peers do not have."""
    run = material.run
    length = run.training.sequence_length
    rows = max(1, plan.tokens // length)
    batch = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(1, run.training.batch_size))
    if not isinstance(run.optimizer, AdamWConfig):
        raise ConfigError(
            f"optimizer.kind is {run.optimizer.kind}, and peers train with AdamW; add optimizer.kind=adamw"
        )
    machine = measured(around, plan.precisions, plan.quick)
    step = {"tokens": rows * length, "rows": batch, "micro_batches": rows // batch, "sequence_length": length}
    flops = material.cost.training_flops_per_token(length)
    with Field(around, left_out) as field:
        limit = around.limit + 3 * plan.slow
        for precision in plan.precisions:
            _enter(field, material, peers, machine, precision, step, plan)
        warm = field.in_turns(max(1, plan.warm_up), lambda lane, turn: _step(lane, limit))
        state = field.each(lambda lane: int(lane.child.ask("state_bytes")))
        field.each(lambda lane: lane.child.ask("forget_peak"))
        taken = field.in_turns(plan.rounds, lambda lane, turn: _step(lane, limit))
        found = {
            key: _row(field.lanes[key], steps, warm[key][0], state[key], step, flops, machine)
            for key, steps in taken.items()
        }
        return {
            "bench": "train",
            **material.facts(),
            "machine": machine.facts(),
            "step": step,
            "training_flops_per_token": flops,
            "rounds": plan.rounds,
            "warm_up": plan.warm_up,
            "contestants": list(found.values()),
            "ratios": _ratios(field, taken, found),
            "left_out": field.left_out,
        }


def _enter(
    field: Field,
    material: Material,
    peers: Sequence[Entry],
    machine: Machine,
    precision: str,
    step: dict[str, int],
    plan: TrainBench,
) -> None:
    """Open ours and the peers in one arithmetic, and let the peers choose their settings."""
    run, around = material.run, field.around
    optimizer = run.optimizer
    assert isinstance(optimizer, AdamWConfig)
    config = material.recipe(precision, step["rows"], step["micro_batches"], around.threads, around.device)
    together = step["rows"] * step["micro_batches"]
    tokens = material.rows(step["sequence_length"], together * -(-ROWS // together))
    shared = {
        "role": "Trainer", "tokens": str(tokens), "precision": precision, "rows": step["rows"],
        "micro_batches": step["micro_batches"], "lr": optimizer.lr, "betas": list(optimizer.betas),
        "eps": optimizer.eps, "weight_decay": optimizer.weight_decay, "clip": run.hardware.gradient_clip,
        "threads": around.threads, "device": around.device,
    }  # fmt: skip
    assert OURS.trains is not None
    field.enter(
        Entry(OURS, sys.executable), OURS.trains, precision,
        lambda: {**shared, "config": str(config), "source": material.source},
    )  # fmt: skip
    heads = run.model.attention.num_attention_heads
    shape = {
        "hidden_size": run.model.hidden_size, "layers": run.model.num_hidden_layers, "heads": heads,
        "vocab_size": material.cost.vocabulary, "length": step["sequence_length"],
    }  # fmt: skip
    for peer in peers:
        needs = step["tokens"] * material.cost.training_flops_per_token(step["sequence_length"])
        needs /= machine.gemm.get(precision, machine.gemm["float32"])
        if peer.contestant.torch and needs > plan.slow:
            field.left_out[f"{peer.name} {precision}"] = (
                f"{precision} products run at {machine.gemm[precision] / 1e9:,.1f} GFLOP/s here, so that a step takes "
                f"{needs:,.0f} s at the least; --slow {needs * 2:,.0f} takes the time"
            )
            continue
        assert peer.contestant.trains is not None
        other = {"shape": shape, "active": material.cost.active_parameters()} if peer.contestant.other else {}
        field.enter(
            peer, peer.contestant.trains, precision,
            lambda other=other: {**shared, **(other or {"model": str(material.folder())})},  # type: ignore[misc]
            choose=None if peer.contestant.other else {},
        )  # fmt: skip


def _step(lane: Lane, limit: float) -> dict[str, Any]:
    return lane.child.ask("step", limit=limit)


def _row(
    lane: Lane,
    steps: Sequence[dict[str, Any]],
    first: dict[str, Any],
    state: int,
    step: dict[str, int],
    flops: float,
    machine: Machine,
) -> dict[str, Any]:
    """What is told of a contestant."""
    speed = Spread.of([step["tokens"] / taken["seconds"] for taken in steps])
    rate, dtype = machine.peak(lane.arithmetic)
    memory = lane.memory(state)
    on_device = int(lane.child.ask("peak_on_device"))
    if on_device:
        memory = {"peak": on_device, "idle": 0, "state": state, "above": on_device - state}
    parts = {part: Spread.of([taken["parts"][part] for taken in steps]).median for part in steps[0]["parts"]}
    return {
        **lane.facts(),
        "tokens_per_second": speed.facts(),
        "mfu": None if lane.other else speed.median * flops / rate,
        "mfu_against": dtype,
        "mfu_float32": None if lane.other else speed.median * flops / machine.gemm["float32"],
        "step_seconds": Spread.of([taken["seconds"] for taken in steps]).facts(),
        "parts_seconds": parts,
        "memory": memory,
        "first_loss": first["loss"],
        "last_loss": steps[-1]["loss"],
    }


def _ratios(
    field: Field, taken: dict[Key, list[dict[str, Any]]], found: dict[Key, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Ours against each peer of the same arithmetic: speed pair by pair, memory, and whether the first loss agrees."""
    rows = []
    for (name, precision), steps in taken.items():
        ours = (OURS.name, precision)
        if name == OURS.name or ours not in taken:
            continue
        speed = ratios([each["seconds"] for each in steps], [each["seconds"] for each in taken[ours]])
        mine, theirs = found[ours], found[name, precision]
        above = (mine["memory"]["above"], theirs["memory"]["above"])
        other = field.lanes[name, precision].other
        rows.append(
            {
                "peer": name,
                "arithmetic": precision,
                "speed": speed.facts(),
                "memory_above_state": above[0] / above[1] if above[1] > 0 else None,
                "first_loss_difference": None if other else mine["first_loss"] - theirs["first_loss"],
                "another_model": other,
            }
        )
    return rows
