"""What was measured, for a person: a table a bench, then ratios, settings, who was left out and why, and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fathom.bench.spread import Spread

MB = 1e6


def console() -> Console:
    """Where tables go."""
    return Console(highlight=False, markup=False)


def page(title: str, found: dict[str, Any], out: Console) -> None:
    """The heading: what was benched, on what."""
    machine = found["machine"]
    out.print(Text(title, style="bold"))
    total, active = found["parameters"], found["active_parameters"]
    say(out, f"{found['config']}: {total:,} parameters, {active:,} active; {found['weights']} weights")
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in machine["gemm_flops"].items())
    say(
        out,
        f"{machine['processor']}, {machine['threads']} threads, allocator {machine['allocator']}: products {rates}; "
        f"memory read {machine['read_bytes_per_second'] / 1e9:.1f}, copied "
        f"{machine['copy_bytes_per_second'] / 1e9:.1f} GB/s",
    )


def tail(found: dict[str, Any], out: Console) -> None:
    """Settings, who was left out, and warnings."""
    for row in found.get("contestants", ()):
        said = ", ".join(f"{name} {value}" for name, value in row["setting"].items() if value is not None)
        tried = "; ".join(f"{way} {1000 * seconds:,.0f} ms" for way, seconds in row["tried"].items())
        name = f"{row['contestant']} {row['version'] or ''}".strip()
        say(out, f"{name}: {said}" + (f" (tried: {tried})" if tried else ""), style="dim")
    for name, why in found["left_out"].items():
        say(out, f"left out: {name}: {why}")
    for note in found["machine"]["notes"]:
        say(out, f"note: {note}", style="yellow")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Names on the left, numbers on the right."""
    made = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for n, column in enumerate(made.columns):
        column.justify = "left" if n < 2 else "right"
        column.no_wrap = True
    for row in rows:
        made.add_row(*row)
    return made


def say(out: Console, line: str, style: str = "") -> None:
    """A line that the terminal may break where it likes."""
    out.print(line, style=style, soft_wrap=True)


def spread(facts: dict[str, Any], form: str = ",.0f") -> str:
    """`156 (151–160)`."""
    return Spread(**facts).shown(form)


def train(found: dict[str, Any]) -> None:
    """`bench train`."""
    out = console()
    page(f"Training, {found['step']['tokens']:,} tokens a step, {found['rounds']} rounds in turns", found, out)
    rows = [
        (
            row["contestant"],
            row["arithmetic"],
            spread(row["tokens_per_second"]),
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['memory']['above'] / MB:,.0f}",
            f"{row['first_loss']:.4f}",
        )
        for row in found["contestants"]
    ]
    out.print(table(("contestant", "", "tokens/s", "MFU", "MB above", "loss"), rows))
    for row in found["contestants"]:
        parts = ", ".join(f"{part} {1000 * seconds:,.1f}" for part, seconds in row["parts_seconds"].items())
        if parts:
            say(out, f"{row['contestant']} {row['arithmetic']}, ms of a step: {parts}")
    for ratio in found["ratios"]:
        memory = ratio["memory_above_state"]
        other = ", which is another model" if ratio["another_model"] else ""
        say(
            out,
            f"fathom : {ratio['peer']} in {ratio['arithmetic']}{other}: {spread(ratio['speed'], '.2f')} times the speed"
            + ("" if memory is None else f", {memory:.2f} times the memory above the state"),
        )
    tail(found, out)


def decode(found: dict[str, Any]) -> None:
    """`bench decode`."""
    out = console()
    page(f"Decoding, {found['new']} tokens greedily, {found['rounds']} rounds in turns", found, out)
    rows = [
        (
            row["contestant"],
            row["arithmetic"],
            cell(row),
            spread(row["decode_tokens_per_second"], ",.1f"),
            f"{row['prefill_tokens_per_second']['median']:,.0f}",
            "-" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.1%}",
        )
        for row in found["rows"]
    ]
    columns = ("contestant", "weights", "rows x ctx", "tokens/s", "read/s", "of mem.")
    out.print(table(columns, rows))
    say(
        out,
        "tokens/s: written; read/s: tokens of prompts; of mem.: share of what memory can be read at, one row",
        "dim",
    )
    if found["ratios"]:
        pairs = [
            (r["peer"], r["arithmetic"], cell(r), spread(r["decode"], ".2f"), spread(r["prefill"], ".2f"))
            for r in found["ratios"]
        ]
        out.print(table(("fathom :", "weights", "rows x ctx", "writing", "reading"), pairs))
    for one in found["agreement"]:
        say(out, agreement(one))
    for row in found["contestants"]:
        memory = row["memory"]
        say(
            out,
            f"{row['contestant']} {row['arithmetic']}: {memory['above'] / MB:,.0f} MB above its "
            f"{memory['state'] / MB:,.0f} MB of weights",
        )
    tail(found, out)


def cell(row: dict[str, Any]) -> str:
    """`8 x 1,024`."""
    return f"{row['batch']} x {row['context']:,}"


def sweep(found: dict[str, Any]) -> None:
    """`bench decode --sweep`."""
    out = console()
    page(f"Decoding against {found['axis']}, {found['rounds']} rounds in turns", found, out)
    rows = [
        (p["contestant"], p["arithmetic"], f"{p['value']:,}", f"{p['step_ms']:,.2f}", f"{p['read_ms']:,.3f}")
        for p in sorted(found["points"], key=lambda p: (p["contestant"], p["arithmetic"], p["value"]))
    ]
    out.print(table(("contestant", "weights", found["sweep"], "ms a step", "ms a token read"), rows))
    for one in found["agreement"]:
        say(out, agreement(one))
    if "plot" in found:
        say(out, f"drawn: {found['plot']}")
    tail(found, out)


def agreement(one: dict[str, Any]) -> str:
    """Whether a peer says the same tokens as Fathom."""
    said = f"{one['peer']} {one['arithmetic']}: {one['same']} of {one['tokens']} greedy tokens as fathom's"
    if one["gap"] is not None:
        said += f"; where they part, the two tokens are {one['gap']:.4f} nats apart"
    return said


def serve(found: dict[str, Any]) -> None:
    """`bench serve`."""
    out = console()
    title = f"Serving: {found['new']} tokens after prompts of {found['context']}, {found['rounds']} rounds in turns"
    page(title, found, out)
    rows = [
        (
            row["way"],
            row["arithmetic"],
            str(row["at_once"]),
            spread(row["tokens_per_second"], ",.1f"),
            percentiles(row["first_seconds"]),
            percentiles(row["gap_seconds"]),
        )
        for row in found["rows"]
    ]
    out.print(table(("way", "weights", "at once", "tokens/s", "first token", "then"), rows))
    say(
        out,
        "first token, then: ms in 50/90/99 % of cases, to the first token of an answer and between its tokens",
        "dim",
    )
    for way, ratio in found["scaling"].items():
        say(out, f"{way}, {ratio['most']} at once : {ratio['few']}: {spread(ratio['ratio'], '.2f')} times the tokens/s")
    for at_once, cost in found["http_cost"].items():
        say(out, f"HTTP costs {spread(cost, '.1%')} of the engine's tokens/s, {at_once} at once")
    cache = found["cache"]
    say(out, f"cache: {cache['bytes_per_token']:,.1f} bytes a token measured, {cache['formula']:,} by the formula")
    for drafts in found["mtp"] or ():
        speculation(drafts, out)
    tail(found, out)


def percentiles(found: dict[str, float]) -> str:
    """`12/15/40`: 50, 90 and 99 %."""
    return "/".join(f"{1000 * found[name]:,.1f}" for name in ("p50", "p90", "p99")) if found else "-"


def speculation(found: dict[str, Any], out: Console) -> None:
    """What MTP gave."""
    say(
        out,
        f"MTP, one at a time, temperature {found['temperature']:g}: acceptance a {found['acceptance']:.1%}, "
        f"draft cost c {found['draft_cost']:.2f} of a plain step ({1000 * found['plain_step']:.2f} ms), "
        f"bound (1 + a) / (1 + c) {found['bound']:.2f}, measured {spread(found['speed_up'], '.2f')} times",
    )
    state = "drafts" if found["auto_speculating"] else "drafts no more"
    speed = spread(found["auto_speed_up"], ".2f")
    say(out, f"  speculative: auto {state} after {found['auto_steps']:,} steps; measured {speed} times")


def data(found: dict[str, Any]) -> None:
    """`bench data`."""
    out = console()
    page("Data", found, out)
    columns = ("part", "", "tokens/s", "MB/s of text", "x training")
    rows = []
    for row in found["rows"]:
        speed = row["megabytes_per_second"]
        rows.append(
            (
                row["part"],
                row["note"],
                spread(row["tokens_per_second"]),
                "-" if speed is None else f"{speed:,.2f}",
                "-" if row["against_training"] is None else f"{row['against_training']:,.0f}",
            )
        )
    out.print(table(columns, rows))
    if found["training_tokens_per_second"] is not None:
        say(out, f"training: {found['training_tokens_per_second']:,.0f} tokens a second, measured in this run")
    tail(found, out)
