"""`fathom bench decode --sweep`: the time of a token against one quantity, all else equal, and its picture.

context   prompts of 16, 32, ... tokens: decoding should grow with C + R a token, reading with a small square
batch     1, 2, 4, ... rows at once
experts   more experts, as many a token and as wide: active parameters stay equal, and so should the time
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fathom.bench.contestants import Entry
from fathom.bench.decode import DecodeBench, bench
from fathom.bench.machine import Surroundings
from fathom.bench.material import Material
from fathom.errors import ConfigError

SWEEPS = {  # name: (what is on the axis, values)
    "context": ("tokens of the prompt", (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    "batch": ("rows at once", (1, 2, 4, 8, 16, 32)),
    "experts": ("experts of a layer, as many a token", (4, 8, 16, 32, 64)),
}
CONTEXT = 128  # tokens of the prompts of the other sweeps


def swept(
    name: str,
    material: Material,
    peers: Sequence[Entry],
    left_out: dict[str, str],
    around: Surroundings,
    plan: DecodeBench,
) -> dict[str, Any]:
    """The bench with the values of a sweep. `points`: for every contestant and value, milliseconds of a token read, and
    of a step of writing, which gives every row a token."""
    values = SWEEPS[name][1][:2] if plan.quick else SWEEPS[name][1]
    window = material.run.model.max_position_embeddings
    if name == "context":
        plan = replace(plan, batches=(1,), contexts=tuple(v for v in values if v + plan.new <= window) or (1,))
        found = bench(material, peers, left_out, around, plan)
    elif name == "batch":
        plan = replace(plan, batches=values, contexts=(min(CONTEXT, window - plan.new),))
        found = bench(material, peers, left_out, around, plan)
    else:
        found = _over_experts(material, peers, left_out, around, replace(plan, batches=(1,)), values)
    points = [_point(row, name) for row in found["rows"]]
    return {**found, "bench": "sweep", "sweep": name, "axis": SWEEPS[name][0], "points": points}


def _point(row: dict[str, Any], name: str) -> dict[str, Any]:
    batch = row["batch"]
    return {
        "contestant": row["contestant"],
        "arithmetic": row["arithmetic"],
        "value": row[name],
        "read_ms": 1000 / row["prefill_tokens_per_second"]["median"],
        "step_ms": 1000 * batch / row["decode_tokens_per_second"]["median"],
    }


def _over_experts(
    material: Material,
    peers: Sequence[Entry],
    left_out: dict[str, str],
    around: Surroundings,
    plan: DecodeBench,
    values: Sequence[int],
) -> dict[str, Any]:
    """A model of random weights for each number of experts."""
    moe = material.run.model.moe
    if moe is None:
        raise ConfigError(f"--sweep experts: {material.name} has no experts; give a configuration with model.moe")
    context = min(CONTEXT, material.run.model.max_position_embeddings - plan.new)
    whole: dict[str, Any] = {}
    for made in _with_experts(material, [v for v in values if v >= moe.num_experts_per_tok]):
        found = bench(made, peers, left_out, around, replace(plan, contexts=(context,)))
        assert made.run.model.moe is not None
        count = {"experts": made.run.model.moe.n_routed_experts}
        for part in ("rows", "ratios", "agreement", "contestants"):
            found[part] = [*whole.get(part, []), *({**row, **count} for row in found[part])]
        whole = {**found, "left_out": {**whole.get("left_out", {}), **found["left_out"]}}
    return whole


def _with_experts(material: Material, values: Sequence[int]) -> Iterator[Material]:
    import shutil

    for value in values:
        model = material.run.model
        assert model.moe is not None
        moe = model.moe.model_copy(update={"n_routed_experts": value, "n_group": 1, "topk_group": 1})
        run = material.run.model_copy(update={"model": model.model_copy(update={"moe": moe})})
        scratch = material.scratch / f"experts-{value}"
        scratch.mkdir()
        yield Material.from_config(material.name, run, scratch, material.tokenizer)
        shutil.rmtree(scratch)


def draw(found: dict[str, Any], folder: Path) -> Path:
    """Two panels, a step of decoding and a token read, a line a contestant: FOLDER/decode-SWEEP.svg."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with matplotlib.rc_context({"svg.hashsalt": "fathom", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, 2)
        keys = list(dict.fromkeys((p["contestant"], p["arithmetic"]) for p in found["points"]))
        for axes, measure, title in zip(
            panels, ("step_ms", "read_ms"), ("a step of decoding, ms", "a token of the prompt, ms"), strict=True
        ):
            for n, key in enumerate(keys):
                line = [p for p in found["points"] if (p["contestant"], p["arithmetic"]) == key]
                axes.plot([p["value"] for p in line], [p[measure] for p in line], "o-", ms=3.5, color=f"C{n}",
                          label=" ".join(key))  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_ylim(bottom=0)
            axes.set_xlabel(found["axis"])
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False, fontsize=9)
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / f"decode-{found['sweep']}.svg"
        figure.savefig(place, metadata={"Date": None})
    return place
