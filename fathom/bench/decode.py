"""`fathom bench decode`: the same prompts, greedy tokens after them, reading and writing timed apart, in turns.

    prefill   B T tokens / seconds until every row has its first token
    decode    tokens after those / seconds after that
    share of bandwidth, one row   (weights that a token uses + its cache) bytes x tokens a second / bytes read a second

No prompt comes twice, so that no prefix cache helps. At equal weights the tokens of all contestants are compared with
ours: nothing is faster by being wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fathom.bench.contestants import OURS, Entry
from fathom.bench.lanes import Field, Key, Lane
from fathom.bench.machine import Machine, Surroundings, measured
from fathom.bench.material import Material
from fathom.bench.spread import Spread, ratios
from fathom.errors import ConfigError

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
KINDS = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
CHOOSE = (OURS.name, "transformers")  # who has several settings to try
TRIAL = 128  # tokens of the prompt that settings are tried with
COMPARED = 16  # greedy tokens that are held against ours
BEGINNING = 48  # tokens of the prompt that they follow


@dataclass(frozen=True)
class DecodeBench:
    """weights: each against its like; batches, contexts: rows and tokens of a prompt; new: tokens after it; rounds:
    turns of every contestant; slow: seconds of reading prompts beyond which a contestant is left out."""

    weights: tuple[str, ...] = ("float32",)
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (16, 256, 1024)
    new: int = 32
    rounds: int = 5
    slow: float = 30.0
    quick: bool = False

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(rows, context)."""
        return [(batch, context) for batch in self.batches for context in self.contexts]


def bench(
    material: Material, peers: Sequence[Entry], left_out: dict[str, str], around: Surroundings, plan: DecodeBench
) -> dict[str, Any]:
    """Everything that was measured, for JSON and `show.decode`. ConfigError: prompts that leave no room."""
    window, most = material.run.model.max_position_embeddings, max(plan.contexts) + plan.new
    if most > window:
        raise ConfigError(
            f"--context {max(plan.contexts)} and --new {plan.new} make {most} tokens, and the model's window holds "
            f"{window}; give less, or model.max_position_embeddings={most} for a configuration"
        )
    machine = measured(around, plan.weights, plan.quick)
    found: dict[str, Any] = {"contestants": [], "rows": [], "ratios": [], "agreement": []}
    told = dict(left_out)
    for weights in plan.weights:
        with Field(around, told) as field:
            _enter(field, material, peers, machine, weights, plan)
            found["agreement"] += _agreement(field, material, plan)
            field.each(lambda lane: lane.child.ask("forget_peak"))
            for batch, context in plan.cells:
                rows = _cell(field, material, machine, plan, batch, context)
                found["rows"] += rows[0]
                found["ratios"] += rows[1]
            state = material.cost.parameters() * BYTES[weights]
            found["contestants"] += field.each(partial(_facts, state=state)).values()
            told = field.left_out
    return {
        "bench": "decode",
        **material.facts(),
        "machine": machine.facts(),
        "new": plan.new,
        "rounds": plan.rounds,
        "cache_bytes_per_token": material.cost.cache_bytes_per_token(4),
        **found,
        "left_out": told,
    }


def _enter(
    field: Field, material: Material, peers: Sequence[Entry], machine: Machine, weights: str, plan: DecodeBench
) -> None:
    """Open everyone who decodes with these weights, and let them choose their settings."""
    around = field.around
    shared = {
        "role": "Decoder", "weights": weights, "rows": max(plan.batches), "window": max(plan.contexts) + plan.new + 1,
        "threads": around.threads, "device": around.device, "letter": letter_of(material),
    }  # fmt: skip
    for entry in [Entry(OURS, sys.executable), *peers]:
        contestant = entry.contestant
        if weights not in contestant.weights:
            field.left_out[f"{entry.name} {weights}"] = f"its weights are {' or '.join(contestant.weights)}"
            continue

        def job(entry: Entry = entry) -> dict[str, Any]:
            if entry.contestant is OURS:
                return {**shared, "model": material.place()}
            place = material.gguf(KINDS[weights]) if entry.contestant.gguf else material.folder()
            return {**shared, "model": str(place)}

        assert contestant.decodes is not None
        length = min(TRIAL if machine.fast(weights) else TRIAL // 8, max(plan.contexts))
        (prompt,) = material.prompts(1, length, "choose")
        chooses = contestant.name in CHOOSE
        field.enter(entry, contestant.decodes, weights, job, {"prompt": prompt} if chooses else None)


def _facts(lane: Lane, state: int) -> dict[str, Any]:
    return {**lane.facts(), "memory": lane.memory(state)}


def letter_of(material: Material) -> int:
    """A token that is one whole character: what llama.cpp is made to say, so that it answers."""
    texts = material.tokenizer.token_bytes
    return next((i for i, text in enumerate(texts) if len(text) == 1 and text.isalpha() and text.isascii()), 0)


def _cell(
    field: Field, material: Material, machine: Machine, plan: DecodeBench, batch: int, context: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One number of rows and one context: everybody warms up, then they take turns."""

    def answer(lane: Lane, turn: int | str) -> tuple[float, float]:
        prompts = material.prompts(batch, context, turn)
        taken = lane.child.ask("answer", limit=field.around.limit, prompts=prompts, new=plan.new)
        return speeds(taken, batch, context, plan.new)

    lanes = [
        lane for lane in field.lanes.values() if not _endless(field, lane, material, machine, plan, batch, context)
    ]
    field.each(lambda lane: answer(lane, "warm up"), lanes)
    taken = field.in_turns(plan.rounds, answer, lanes)
    rows = [_row(field.lanes[key], samples, material, machine, batch, context) for key, samples in taken.items()]
    return rows, _ratios(taken, batch, context)


def _endless(
    field: Field, lane: Lane, material: Material, machine: Machine, plan: DecodeBench, batch: int, context: int
) -> bool:
    """Whether reading the prompts would take longer than a bench should, for the want of fast products."""
    needs = batch * context * material.cost.flops_per_token(context / 2) / machine.gemm.get(lane.arithmetic, 1e30)
    if not lane.torch or needs <= plan.slow:
        return False
    rate = machine.gemm[lane.arithmetic] / 1e9
    field.left_out[f"{lane.title}, {batch} x {context}"] = (
        f"{lane.arithmetic} products run at {rate:,.1f} GFLOP/s here, so that reading takes {needs:,.0f} s at the "
        f"least; --slow {2 * needs:,.0f} takes the time"
    )
    return True


def speeds(taken: dict[str, Any], batch: int, context: int, new: int) -> tuple[float, float]:
    """Tokens a second of reading and of writing. Where a contestant tells how long each row wrote: rows end together
    and write evenly, so that those who began earlier had more tokens when the last one began."""
    if "each" in taken:
        shortest = min(taken["each"])
        first = taken["whole"] - shortest
        early = sum(1 + (new - 1) * (1 - shortest / seconds) for seconds in taken["each"])
    else:
        first, early = taken["first"], taken.get("early", batch)
    return batch * context / first, (batch * new - early) / max(1e-9, taken["whole"] - first)


def _row(
    lane: Lane, samples: Sequence[tuple[float, float]], material: Material, machine: Machine, batch: int, context: int
) -> dict[str, Any]:
    prefill, decode = (Spread.of([sample[n] for sample in samples]) for n in (0, 1))
    width = BYTES[lane.arithmetic]
    moved = material.cost.active_parameters() * width + context * material.cost.cache_bytes_per_token(max(2, width))
    return {
        "contestant": lane.name,
        "arithmetic": lane.arithmetic,
        "batch": batch,
        "context": context,
        "prefill_tokens_per_second": prefill.facts(),
        "decode_tokens_per_second": decode.facts(),
        "bandwidth_share": decode.median * moved / machine.read if batch == 1 else None,
    }


def _ratios(taken: dict[Key, list[tuple[float, float]]], batch: int, context: int) -> list[dict[str, Any]]:
    """Ours against each peer with the same weights, pair by pair."""
    rows = []
    for (name, weights), samples in taken.items():
        ours = taken.get((OURS.name, weights))
        if name == OURS.name or ours is None:
            continue
        prefill, decode = (ratios([one[n] for one in ours], [one[n] for one in samples]) for n in (0, 1))
        cell = {"peer": name, "arithmetic": weights, "batch": batch, "context": context}
        rows.append({**cell, "prefill": prefill.facts(), "decode": decode.facts()})
    return rows


# --- the same tokens ------------------------------------------------------------


def _agreement(field: Field, material: Material, plan: DecodeBench) -> list[dict[str, Any]]:
    """Greedy tokens of the peers against ours, to the first that is another."""
    (prompt,) = material.prompts(1, min(BEGINNING, max(plan.contexts)), "agreement")
    count = min(COMPARED, plan.new)

    def said(lane: Lane) -> list[int]:
        whole = lane.child.ask("answer", prompts=[prompt], new=count)["tokens"]
        return whole[0] if whole is not None else lane.child.ask("tokens", prompt=prompt, new=count)

    told = field.each(said)
    rows = []
    for (name, weights), theirs in told.items():
        ours = told.get((OURS.name, weights))
        if name == OURS.name or ours is None:
            continue
        same = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
        gap = None
        if same < min(len(ours), len(theirs)):
            after = [*prompt, *ours[:same]]
            lane = field.lanes[OURS.name, weights]
            gap = float(lane.child.ask("gap", prompt=after, ours=ours[same], theirs=theirs[same]))
        rows.append({"peer": name, "arithmetic": weights, "same": same, "tokens": len(ours), "gap": gap})
    return rows
