"""`fathom bench data`: the data path piece by piece, and how many trainings like this one each piece could feed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from fathom.bench.contestants import Contestant, Entry
from fathom.bench.lanes import Field
from fathom.bench.machine import Surroundings, measured
from fathom.bench.material import Material
from fathom.bench.spread import Spread
from fathom.bench.train import TrainBench
from fathom.bench.train import bench as train
from fathom.errors import UserError
from fathom.optim.build import AdamWConfig

PARTS = {"encode": "texts to tokens", "shards": "texts to shards on disk", "batches": "shards to batches"}
TEXTS = 249  # that there are


@dataclass(frozen=True)
class DataBench:
    """texts: of the embedded ones; batches: of a round; steps: of training that are timed."""

    rounds: int = 5
    texts: int = 60
    batches: int = 400
    steps: int = 5
    quick: bool = False


def bench(material: Material, around: Surroundings, plan: DataBench) -> dict[str, Any]:
    """Everything that was measured, for JSON and `show.data`. UserError: the data path cannot be opened."""
    machine = measured(around, (), plan.quick)
    rate = _training(material, around, plan)
    training = material.run.training
    cache = material.scratch / "cache"
    cache.mkdir()
    job = {
        "role": "Feeder", "model": material.native(), "texts": plan.texts, "share": min(1.0, plan.texts / TEXTS),
        "batch_size": training.batch_size, "sequence_length": training.sequence_length, "batches": plan.batches,
        "cache": str(cache),
    }  # fmt: skip
    with Field(around, {}) as field:
        entry = Entry(Contestant("fathom", None), sys.executable)
        lane = field.enter(entry, "ours_feeding", "", lambda: job)
        if lane is None:
            raise UserError(f"the data path cannot be opened: {', '.join(field.left_out.values())}")
        warm = field.each(lambda lane: [lane.child.ask(part) for part in PARTS])
        taken = field.in_turns(plan.rounds, lambda lane, turn: [lane.child.ask(part) for part in PARTS])
        if not warm or not taken:
            raise UserError(f"the data path failed: {', '.join(field.left_out.values())}")
        (samples,) = taken.values()
        facts = [lane.facts()]
    return {
        "bench": "data",
        **material.facts(),
        "machine": machine.facts(),
        "training_tokens_per_second": rate,
        "rows": [_row(part, [each[n] for each in samples], rate) for n, part in enumerate(PARTS)],
        "contestants": facts,
        "left_out": {},
    }


def _row(part: str, samples: list[dict[str, float]], rate: float | None) -> dict[str, Any]:
    speed = Spread.of([one["tokens"] / one["seconds"] for one in samples])
    volume = Spread.of([one["bytes"] / one["seconds"] for one in samples]).median / 1e6
    return {
        "part": part,
        "note": PARTS[part],
        "tokens_per_second": speed.facts(),
        "megabytes_per_second": volume or None,
        "against_training": None if rate is None else speed.median / rate,
    }


def _training(material: Material, around: Surroundings, plan: DataBench) -> float | None:
    """Tokens a second of a training step of the same configuration; None: it was not measured."""
    if not isinstance(material.run.optimizer, AdamWConfig):
        return None
    length = material.run.training.sequence_length
    tokens = min(2048, material.run.training.batch_size * length)
    few = TrainBench(rounds=plan.steps, warm_up=1, tokens=max(length, tokens), quick=True)
    found = train(material, (), {}, around, replace(few, precisions=("float32",)))
    rows = found["contestants"]
    return float(rows[0]["tokens_per_second"]["median"]) if rows else None
