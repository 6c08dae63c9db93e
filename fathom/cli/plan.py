"""`fathom plan`: what a configuration costs, before anything is allocated. The formulas are model/cost.py's."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fathom.model.cost import Cost, Precision
    from fathom.recipe import RunConfig

MEMORY = {  # GB by data sheet, of the names in runtime/device.py; where a card comes in two sizes, the larger
    "GB200": 186, "B200": 180, "H200": 141, "H100 PCIe": 80, "H100 NVL": 94, "H100": 80, "H800": 80, "H20": 96,
    "GH200": 96, "A100": 80, "A800": 80, "A6000": 48, "A40": 48, "A30": 24, "A10G": 24, "A10": 24, "L40S": 48,
    "L40": 48, "L4": 24, "RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24, "V100": 32, "T4": 16,
    "MI300X": 192, "MI250X": 128,
}  # fmt: skip
WITHOUT_BFLOAT16 = {"V100", "T4"}


def command(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run, e.g. configs/v3.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ..., laid over the file.", metavar="[KEY=VALUE]...")
    ] = None,
    world: Annotated[int, typer.Option(min=1, help="Devices that train together, each with the whole model.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="Estimate the time on this device: cpu (this one), h100, ...")
    ] = None,
    utilization: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the device's peak that is assumed.")
    ] = 0.4,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Count parameters, FLOPs, cache, memory and time without allocating a weight.

    Example: fathom plan configs/v3.yaml --world 2048 --device h800
    """
    from fathom.recipe import load_config

    found = facts(load_config(config, overrides or ()), world, device, utilization)
    if json_:
        import json

        print(json.dumps({"config": str(config), **found}))
    else:
        show(str(config), found)


def facts(run: RunConfig, world: int = 1, device: str | None = None, utilization: float = 0.4) -> dict[str, Any]:
    """Everything that the plan tells, as plain numbers; bytes, FLOPs and seconds.

    ConfigError: an unknown device, more devices than rows, a vocabulary whose size only the data can tell.
    """
    from fathom.errors import ConfigError
    from fathom.model.cost import Cost

    training = run.training
    rows = math.ceil(training.batch_size / world)
    if world > training.batch_size:
        raise ConfigError(
            f"--world is {world}, but a micro-batch has training.batch_size {training.batch_size} rows; "
            "give every device at least one row"
        )
    known = find_device(device)
    precision = _precision(run, known)
    cost = Cost(run.model.model_copy(update={"vocab_size": _vocabulary(run)}))
    memory = cost.training_memory(rows, training.sequence_length, precision, run.hardware.recompute, run.optimizer.kind)
    tokens = training.batch_size * training.gradient_accumulation_steps * training.sequence_length
    per_token = cost.training_flops_per_token(training.sequence_length)
    return {
        "parameters": cost.parameters(),
        "active_parameters": cost.active_parameters(),
        "mtp_parameters": cost.mtp_parameters(),
        "parameters_by_part": _parts(cost),
        "vocab_size": cost.vocabulary,
        "attention": run.model.attention.kind,
        "cache_bytes_per_token": cost.cache_bytes_per_token(2),
        "cache_bytes_per_token_by_attention": cost.cache_comparison(2),
        "max_position_embeddings": run.model.max_position_embeddings,
        "flops_per_token": cost.flops_per_token(training.sequence_length),
        "training_flops_per_token": per_token,
        "sequence_length": training.sequence_length,
        "tokens_per_step": tokens,
        "steps": training.max_steps,
        "tokens": tokens * training.max_steps,
        "training_flops": per_token * tokens * training.max_steps,
        "precision": precision,
        "recompute": run.hardware.recompute,
        "optimizer": run.optimizer.kind,
        "world": world,
        "rows_per_device": rows,
        "training_memory": {part: getattr(memory, part) for part in PARTS} | {"total": memory.total},
        **_time(run, known, precision, per_token, tokens, world, utilization),
    }


PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def _vocabulary(run: RunConfig) -> int:
    """V: the model's, or else the tokenizer's; a BPE that is still to be trained is taken at its word."""
    from fathom.errors import ConfigError
    from fathom.tokenizer.train import BPE, Character, build

    if run.model.vocab_size is not None:
        return run.model.vocab_size
    if isinstance(run.tokenizer, BPE):
        return run.tokenizer.vocab_size
    if isinstance(run.tokenizer, Character):
        raise ConfigError(
            "model.vocab_size is null and tokenizer.kind is character, so only the text can tell the model's size; "
            "add an estimate, for instance model.vocab_size=100"
        )
    return build(run.tokenizer, lambda: ()).vocab_size


def _parts(cost: Cost) -> dict[str, dict[str, int]]:
    """Parameters by part of the main model, all and those that a token uses."""
    model = cost.config
    layers = range(model.num_hidden_layers)
    dense = [cost.feed_forward(i) for i in layers if model.moe_of(i) is None]
    sparse = [cost.feed_forward(i) for i in layers if model.moe_of(i) is not None]
    table = cost.vocabulary * model.hidden_size
    attention = len(layers) * cost.attention().total
    parts = {
        "embedding" if not model.tie_word_embeddings else "embedding and head": (
            table,
            table if model.tie_word_embeddings else 0,
        ),
        f"attention ({len(layers)} layers)": (attention, attention),
    }
    if dense:
        total = sum(size.total for size in dense)
        parts[f"dense FFN ({len(dense)} layers)"] = (total, total)
    if sparse:
        total = sum(size.total for size in sparse)
        parts[f"experts ({len(sparse)} layers)"] = (total, total - sum(size.unused for size in sparse))
    if model.ngram is not None:
        parts["n-gram memory"] = (cost.memory().total, cost.memory().total)
    norms = (2 * len(layers) + 1) * model.hidden_size
    parts["norms"] = (norms, norms)
    if not model.tie_word_embeddings:
        parts["head"] = (table, table)
    return {name: {"total": total, "active": active} for name, (total, active) in parts.items()}


# --- devices and time ------------------------------------------------------------


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def find_device(name: str | None) -> str | None:
    """The device's name in runtime/device.py's table, 'cpu', or None for none given. ConfigError: unknown."""
    from fathom.errors import ConfigError
    from fathom.runtime.device import PEAKS

    if name is None:
        return None
    known = {re.sub(r"[^a-z0-9]", "", device.lower()): device for device in ("cpu", *PEAKS)}
    plain = re.sub(r"nvidia|amd|geforce|sxm\d?|[^a-z0-9]", "", name.lower())
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, list(known), n=1, cutoff=0.6)
    hint = f"; did you mean {_slug(known[near[0]])}?" if near else ""
    raise ConfigError(
        f"--device {name}: no such device is known{hint}; possible are {', '.join(map(_slug, known.values()))}"
    )


def _precision(run: RunConfig, device: str | None) -> Precision:
    from fathom.errors import ConfigError
    from fathom.runtime.device import cpu_has_bfloat16

    asked = run.hardware.precision
    if device in WITHOUT_BFLOAT16 and asked == "bfloat16":
        raise ConfigError(
            f"--device {_slug(str(device))} does not compute hardware.precision bfloat16; use float16 or float32"
        )
    if asked != "auto":
        return asked
    if device not in (None, "cpu"):
        return "float32" if device in WITHOUT_BFLOAT16 else "bfloat16"
    return "bfloat16" if cpu_has_bfloat16() else "float32"


def _time(
    run: RunConfig,
    device: str | None,
    precision: Precision,
    per_token: float,
    tokens: int,
    world: int,
    utilization: float,
) -> dict[str, Any]:
    """The time that so many operations take at a share of the peak; nothing about data, networks or stalls."""
    if device is None:
        return {}
    from fathom.runtime.device import DTYPES, HardwareConfig, set_up, tabled_peak

    if device == "cpu":
        here = set_up(HardwareConfig(accelerator="cpu", precision=precision, threads=run.hardware.threads))
        peak, name, memory = here.peak_flops, here.name, _cpu_memory()
    else:
        peak = tabled_peak(device, DTYPES[precision], run.hardware.allow_tf32) or 0.0
        name, memory = device, MEMORY.get(device, 0) * 10**9
    again = 4 / 3 if run.hardware.recompute else 1.0  # a second forward pass
    speed = peak * utilization * world / (per_token * again)
    return {
        "device": name,
        "device_memory": memory,
        "peak_flops": peak,
        "utilization": utilization,
        "tokens_per_second": speed,
        "seconds_per_step": tokens / speed,
        "seconds": tokens * run.training.max_steps / speed,
    }


def _cpu_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


# --- to look at ------------------------------------------------------------


def count(number: float) -> str:
    """15.706B, 84.467M, 1,234."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            shown = number / size
            return f"{shown:.2f}{letter}" if shown >= 100 else f"{shown:.3f}{letter}"
    return f"{number:,.0f}"


def amount(number: float, unit: str) -> str:
    """1.23 GFLOP, 45.6 GB: powers of 1000, three digits."""
    for size, letter in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if number >= size:
            return (
                f"{number / size:.3g} {letter}{unit}"
                if number < 999.5 * size
                else f"{number / size:.0f} {letter}{unit}"
            )
    return f"{number:.0f} {unit}"


def duration(seconds: float) -> str:
    """90 s, 12 min, 5.2 h, 3.1 days."""
    for size, unit in ((365.25 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def show(title: str, found: dict[str, Any]) -> None:
    """The plan as a page for the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    page = Table(
        box=box.SIMPLE_HEAD, title=f"The plan of {title}", title_justify="left", title_style="bold", pad_edge=False
    )
    page.add_column("")
    page.add_column("", justify="right")
    page.add_column("", justify="right", style="dim")
    page.show_header = False
    sections = [_parameters, _operations, _cache, _memory] + ([_speed] if "device" in found else [])
    for section in sections:
        (head, *rest), *rows = section(found)
        page.add_row(f"[bold cyan]{head}", *[f"[bold]{cell}" for cell in rest])
        for row in rows:
            page.add_row(f"  {row[0]}", *row[1:])
        page.add_section()
    Console(highlight=False, soft_wrap=False).print(page)


Rows = list[tuple[str, str, str]]


def _parameters(found: dict[str, Any]) -> Rows:
    total, active = found["parameters"], found["active_parameters"]
    rows = [("Parameters", "total", "active"), ("all", f"{total:,}", f"{active:,}"), ("", count(total), count(active))]
    rows += [
        (name, count(part["total"]), count(part["active"]) if part["active"] else "-")
        for name, part in found["parameters_by_part"].items()
    ]
    if found["mtp_parameters"]:
        rows.append(("MTP depths, besides", count(found["mtp_parameters"]), "in training"))
    return rows


def _operations(found: dict[str, Any]) -> Rows:
    return [
        ("Operations", "", ""),
        ("a token, forward", amount(found["flops_per_token"], "FLOP"), f"seeing {found['sequence_length']:,} tokens"),
        ("a token, training", amount(found["training_flops_per_token"], "FLOP"), "forward and backward"),
        (
            "an optimizer step",
            amount(found["training_flops"] / found["steps"], "FLOP"),
            f"{found['tokens_per_step']:,} tokens",
        ),
        (
            "the run",
            amount(found["training_flops"], "FLOP"),
            f"{count(found['tokens'])} tokens in {found['steps']:,} steps",
        ),
    ]


def _cache(found: dict[str, Any]) -> Rows:
    window = found["max_position_embeddings"]
    rows = [("Cache in bfloat16", "a token", f"{window:,} tokens")]
    for kind, size in found["cache_bytes_per_token_by_attention"].items():
        name = f"{kind.upper()} (this model)" if kind == found["attention"] else f"{kind.upper()} at the same heads"
        rows.append((name, f"{size:,} B", amount(size * window, "B")))
    return rows


def _memory(found: dict[str, Any]) -> Rows:
    memory = found["training_memory"]
    kind = f"{found['precision']}{', recomputed' if found['recompute'] else ''}"
    notes = {
        "weights": found["precision"] if found["precision"] == "float32" else f"float32 and {found['precision']}",
        "optimizer": found["optimizer"],
        "activations": f"{found['rows_per_device']:,} x {found['sequence_length']:,}, {kind}",
        "logits": "a chunk at a time",
    }
    rows = [("Memory of a training step", "", "estimate" if found["world"] == 1 else "estimate, each device")]
    rows += [(part, amount(memory[part], "B"), notes.get(part, "")) for part in PARTS]
    full = found.get("device_memory")
    against = f"of {amount(full, 'B')}: {'fits' if memory['total'] < full else 'does not fit'}" if full else ""
    return [*rows, ("total", amount(memory["total"], "B"), against)]


def _speed(found: dict[str, Any]) -> Rows:
    machines = f"{found['world']:,} x {found['device']}" if found["world"] > 1 else found["device"]
    share = f"{found['utilization']:.0%} of {amount(found['peak_flops'], 'FLOP/s')}"
    return [
        (f"Time on {machines}", "", f"at {share}"),
        ("tokens a second", f"{found['tokens_per_second']:,.0f}", ""),
        ("an optimizer step", duration(found["seconds_per_step"]), ""),
        ("the run", duration(found["seconds"]), ""),
    ]
