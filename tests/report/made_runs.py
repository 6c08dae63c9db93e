"""Run folders made of whole cloth, in the columns that train/ writes. As a script: python made_runs.py FOLDER."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

METRICS = (
    "step,tokens,epoch,train_loss,val_loss,val_bpb,mtp_loss,balance_loss,lr,grad_norm,tokens_per_second,mfu,seconds"
)
EXPERTS = "step,layer,expert,load,bias,max_vio,entropy,dead,dropped"
HARDWARE = "step,seconds,cpu_percent,process_bytes,memory_percent,gpu_percent,gpu_memory_bytes,gpu_watts,gpu_celsius"
CONFIG = """model:
  hidden_size: 192
  num_hidden_layers: 4
  attention: {kind: mla, num_attention_heads: 4}
  moe: {n_routed_experts: 16, n_shared_experts: 1, num_experts_per_tok: 4}
optimizer: {kind: muon, lr: 0.02}
training: {output_dir: NAME, max_steps: STEPS, seed: 5}
"""
NASTY = "</blockquote><script>alert('x')</script> & \x00\x1b[31m \u202e ]]> <!-- "


def table(path: Path, header: str, rows: list[list[Any]]) -> None:
    """None is an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(header.split(","))
        out.writerows([["" if cell is None else cell for cell in row] for row in rows])


def make_run(
    folder: Path,
    *,
    steps: int = 60,
    every: int = 5,
    layers: tuple[int, ...] = (1, 2, 3),
    experts: int = 5,
    mtp: bool = True,
    validation: bool = True,
    gpu: bool = False,
    skew: float = 1.0,
    seed: int = 1,
) -> Path:
    """A run whose losses fall and whose experts become even."""
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, "fathom": "0"}))
    (folder / "config.yaml").write_text(CONFIG.replace("NAME", str(folder)).replace("STEPS", str(steps)))
    facts = {"parameters": 6_123_457, "active_parameters": 3_456_789, "device": {"name": "toy", "precision": "float32"}}
    (folder / "environment.json").write_text(json.dumps({**facts, "packages": {"torch": "2.11.0", "wandb": None}}))
    logged = list(range(every, steps + 1, every))
    table(folder / "metrics.csv", METRICS, [_metrics(s, steps, every, mtp, validation, chance) for s in logged])
    if layers:
        rows = _experts(logged, steps, layers, experts, skew, chance)
        table(folder / "experts.csv", EXPERTS, rows)
    table(folder / "hardware.csv", HARDWARE, _hardware(steps, gpu, chance))
    prompts = ["The state of the union is", "Fellow citizens,"]
    words = [[s, p, f" strong\nat step {s}."] for s in logged[:: max(1, len(logged) // 6)] for p in prompts]
    table(folder / "samples.csv", "step,prompt,generated_text", [*words, [steps, "<b>", NASTY]])
    events = [{"step": steps // 3, "event": "skipped: gradient spike", "loss": 3.2, "grad_norm": 88.0}]
    events += [{"step": s, "event": "checkpoint"} for s in (steps // 2, steps)]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def _metrics(step: int, steps: int, every: int, mtp: bool, validation: bool, chance: Any) -> list[Any]:
    loss = 2.9 + 4.7 * math.exp(-5 * step / steps) + 0.05 * chance.normal()
    evaluated = validation and (step % (4 * every) == 0 or step == steps)
    val = loss + 0.08 if evaluated else None
    lr = 0.02 * min(1, 20 * step / steps) * (1 if step < 0.7 * steps else max(0.0, (steps - step) / (0.3 * steps)))
    norm = 0.4 + 3 * math.exp(-9 * step / steps) + 0.06 * abs(chance.normal())
    speed = 9000 + 250 * chance.normal()
    return [step, step * 4096, step / steps, loss, val, None if val is None else val / 2.9, loss + 0.6 if mtp else None,
            1e-4, lr, norm, speed, speed / 22000, step * 0.45 + 3]  # fmt: skip


def _experts(logged: list[int], steps: int, layers: Any, experts: int, skew: float, chance: Any) -> list[list[Any]]:
    rows = []
    for layer in layers:
        liked = chance.normal(size=experts) * skew
        phase = chance.uniform(0, 6, size=experts)
        for step in logged:
            left = math.exp(-6 * step / steps) + 0.02
            weight = np.exp(liked * left + 0.04 * np.sin(phase + 9 * step / steps) + 0.03 * chance.normal(size=experts))
            load = weight / weight.sum()
            shared = [load.max() * experts - 1, math.log(experts) * (1 - 0.05 * left), 0, 0]
            rows += [[step, layer, e, load[e], -0.1 * liked[e] * (1 - left), *shared] for e in range(experts)]
    return rows


def _hardware(steps: int, gpu: bool, chance: Any) -> list[list[Any]]:
    rows = []
    for i in range(40):
        seconds = 10 * (i if i < 25 else i - 25) + 5
        devices = [90 + 5 * chance.uniform(), 4e10, 610 + 40 * chance.uniform(), 61] if gpu else [None] * 4
        rows.append([steps * i // 40, seconds, 92 + 6 * chance.uniform(), 1.1e9 + 1e6 * i, 31 + 0.02 * i, *devices])
    return rows


if __name__ == "__main__":
    import sys

    place = Path(sys.argv[1])
    make_run(place / "demo", steps=1200, every=10, experts=16)
    make_run(place / "unbalanced", steps=1200, every=10, experts=16, skew=1.4, seed=2, gpu=True)
    make_run(place / "other" / "demo", steps=900, every=3, experts=64, layers=tuple(range(1, 9)), seed=3, mtp=False)
