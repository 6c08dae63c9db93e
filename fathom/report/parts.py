"""Parts of the page: headline, figures, tables, samples, events. Each takes what was read and gives HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import yaml

from fathom.report.maps import colors
from fathom.report.plots import DASHES, Plot, dash
from fathom.report.read import Event, RunTables
from fathom.report.summary import Summary, is_skip
from fathom.report.svg import SERIES
from fathom.report.words import count, duration, esc, flat

SHOWN = 200  # events, at most
NONE = "–"


def tiles(s: Summary) -> str:
    """The headline figures that were measured: (name, value, a word on it)."""
    best = "" if s.best_val_loss is None or s.best_step is None else f"best {s.best_val_loss:.4f}, step {s.best_step:,}"
    lowest = "" if s.best_val_bpb is None else f"best {s.best_val_bpb:.4f}"
    active = "" if s.active_parameters is None else f"{count(s.active_parameters)} active"
    steps = "" if s.step is None else f"in {s.step:,} steps"
    found = [
        ("Validation loss", _form(s.val_loss, "{:.4f}"), best),
        ("Bits per byte", _form(s.val_bpb, "{:.4f}"), lowest),
        ("Training loss", _form(s.train_loss, "{:.4f}"), "nats a token, last row"),
        ("Parameters", None if s.parameters is None else count(s.parameters), active),
        ("Tokens", None if s.tokens is None else count(s.tokens), steps),
        ("Time", None if s.seconds is None else duration(s.seconds), _resumed(s.resumes)),
        ("Tokens a second", _form(s.tokens_per_second, "{:,.0f}"), _form(s.mfu, "{:.1%} of peak FLOP/s") or ""),
        ("MaxVio", _form(s.max_vio, "{:.3f}"), _balance(s)),
    ]
    cells = [
        f"<div><dt>{name}</dt><dd>{esc(value)}</dd>{f'<dd>{esc(more)}</dd>' if more else ''}</div>"
        for name, value, more in found
        if value is not None
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>' if cells else ""


def _form(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _resumed(times: int) -> str:
    return "" if not times else "resumed once" if times == 1 else f"resumed {times} times"


def _balance(s: Summary) -> str:
    dead = "no dead expert" if not s.dead_experts else f"{s.dead_experts} dead experts"
    return "" if s.window is None else f"last {s.window:,} steps; {dead}"


def about(run: RunTables) -> str:
    """One line on the model and the machine, from the configuration and the environment."""
    known = settings(run)
    said = []
    if layers := known.get("model.num_hidden_layers"):
        said.append(f"{layers} layers")
    if width := known.get("model.hidden_size"):
        said.append(f"width {width}")
    if kind := known.get("model.attention.kind"):
        said.append(f"{kind.upper()} attention")
    if routed := known.get("model.moe.n_routed_experts"):
        shared = known.get("model.moe.n_shared_experts", "0")
        chosen = known.get("model.moe.num_experts_per_tok", "?")
        said.append(f"{chosen} of {routed} experts" + (f" and {shared} shared" if shared not in ("0", "null") else ""))
    device = run.environment.get("device")
    if isinstance(device, dict) and device.get("name"):
        said.append(", ".join(str(device[key]) for key in ("name", "precision") if device.get(key)))
    return " · ".join(said)


def settings(run: RunTables) -> dict[str, str]:
    """config.yaml as dotted keys; {} if there is none, or none that can be read."""
    try:
        tree = yaml.safe_load(run.config)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that no calendar has
        return {}
    return flat(tree) if isinstance(tree, dict) else {}


def plots(found: Iterable[Plot]) -> str:
    """Drawings, two beside each other or one over the whole width."""
    figures = [
        f"<figure{' class=wide' if plot.wide else ''}><h3>{esc(plot.title)}</h3>"
        f"<figcaption>{esc(plot.caption)}</figcaption>"
        f'<div class="drawing">{plot.svg}</div></figure>'
        for plot in found
    ]
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def key(runs: Sequence[RunTables]) -> str:
    """Which colour is which run."""
    items = []
    for number, run in enumerate(runs):
        pattern = DASHES[dash(number)]
        gaps = "" if isinstance(pattern, str) else f' stroke-dasharray="{" ".join(str(3 * n) for n in pattern[1])}"'
        line = (
            f'<svg viewBox="0 0 27 8" aria-hidden="true"><path d="M0 4H27" stroke="var(--s{number % len(SERIES)})" '
            f'stroke-width="3"{gaps}/></svg>'
        )
        items.append(f"<li>{line}{esc(run.name)}</li>")
    return f'<ul class="key">{"".join(items)}</ul>'


def scale() -> str:
    """The colours of the expert maps."""
    stops = [f"rgba({r},{g},{b},{a / 255:.2f})" for r, g, b, a in colors(np.linspace(0, 2, 21))]
    ramp = f"background:linear-gradient(90deg,{','.join(stops)})"
    return f'<p class="scale">no token <i style="{ramp}"></i> twice a fair share and more</p>'


COLUMNS = (  # of the comparison: name, field, form, whether the lowest or the highest is the best
    ("val loss", "val_loss", "{:.4f}", min),
    ("best", "best_val_loss", "{:.4f}", min),
    ("bits/byte", "val_bpb", "{:.4f}", min),
    ("train loss", "train_loss", "{:.4f}", min),
    ("MaxVio", "max_vio", "{:.3f}", min),
    ("tokens/s", "tokens_per_second", "{:,.0f}", max),
    ("MFU", "mfu", "{:.1%}", max),
    ("time", "seconds", "", None),
    ("steps", "step", "{:,}", None),
    ("tokens", "tokens", "", None),
    ("parameters", "parameters", "", None),
    ("skipped", "skipped_steps", "{:,}", None),
)


def compare(runs: Sequence[RunTables], summaries: Sequence[Summary]) -> str:
    """One row a run; columns that no run measured are left out, the best of a column is bold."""
    columns = [c for c in COLUMNS if any(getattr(s, c[1]) for s in summaries)]
    head = "".join(f"<th scope=col>{name}</th>" for name, *_ in columns)
    rows = []
    for run, summary in zip(runs, summaries, strict=True):
        cells = [_compared(summary, summaries, *column[1:]) for column in columns]
        rows.append(f"<tr><th scope=row>{esc(run.name)}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="numbers sortable"><thead><tr><th scope=col>run</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _compared(summary: Summary, all_: Sequence[Summary], name: str, form: str, choose: Any) -> str:
    value = getattr(summary, name)
    if value is None:
        return f'<td data-value="">{NONE}</td>'
    others = [v for s in all_ if (v := getattr(s, name)) is not None]
    best = " class=best" if choose is not None and len(others) > 1 and value == choose(others) else ""
    text = form.format(value) if form else duration(value) if name == "seconds" else count(value)
    return f'<td data-value="{value!r}"{best}>{esc(text)}</td>'


def differences(runs: Sequence[RunTables]) -> str:
    """The settings in which runs differ; "" where a configuration is missing."""
    known = [settings(run) for run in runs]
    if not all(known):
        return ""
    names = [name for name in dict.fromkeys(n for k in known for n in k) if len({k.get(name) for k in known}) > 1]
    names = [name for name in names if name != "training.output_dir"]
    if not names:
        return '<p class="note">Their configurations are the same but for the run folder.</p>'
    head = "".join(f"<th scope=col>{esc(run.name)}</th>" for run in runs)
    rows = []
    for name in names:
        cells = "".join(f"<td>{esc(each.get(name, NONE))}</td>" for each in known)
        rows.append(f"<tr><th scope=row><code>{esc(name)}</code></th>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th scope=col>setting</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def samples(run: RunTables) -> str:
    """Samples by step, the last one open."""
    by_step = [
        (step, list(each)) for step, each in groupby(sorted(run.samples, key=lambda s: s.step), lambda s: s.step)
    ]
    blocks = []
    for number, (step, each) in enumerate(by_step, start=1):
        quotes = "".join(f"<blockquote dir=auto><b>{esc(s.prompt)}</b>{esc(s.text)}</blockquote>" for s in each)
        blocks.append(
            f"<details{' open' if number == len(by_step) else ''}><summary>Step {step:,}</summary>{quotes}</details>"
        )
    return f'<div class="samples">{"".join(blocks)}</div>' if blocks else ""


def events(run: RunTables, resumed: Sequence[int]) -> str:
    """Skipped steps, resumes and whatever else happened; checkpoints in one line."""
    saved = sorted({event.step for event in run.events if event.kind == "checkpoint"})
    rest = [event for event in run.events if event.kind != "checkpoint"]
    told = {event.step for event in rest if event.kind.startswith("resume")}
    rest += [Event(step, "resumed", {}) for step in resumed if step not in told]
    rest.sort(key=lambda event: event.step)
    skipped = sum(map(is_skip, rest))
    said = [f"{skipped:,} steps were skipped." if skipped != 1 else "One step was skipped."] if skipped else []
    if saved:
        what = "Checkpoints were" if len(saved) > 1 else "A checkpoint was"
        said.append(f"{what} written after {'steps' if len(saved) > 1 else 'step'} {_some(saved)}.")
    if len(rest) > SHOWN:
        said.append(f"The last {SHOWN} of {len(rest):,} events are shown.")
    note = f"<p>{esc(' '.join(said))}</p>" if said else ""
    rows = [(f"{event.step:,}", event.kind, facts(event.facts)) for event in rest[-SHOWN:]]
    return note + (table(("step", "event", "facts"), rows) if rows else "")


def _some(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps]
    if len(shown) > 12:
        shown = [*shown[:4], "…", *shown[-4:]]
    return ", ".join(shown)


def facts(found: Mapping[str, Any]) -> str:
    """loss 3.2, grad_norm 88."""
    return ", ".join(f"{name} {value}" for name, value in flat(dict(found)).items()) if found else ""


def environment(run: RunTables) -> str:
    """environment.json as a table."""
    return table(("", ""), list(flat(run.environment).items())) if run.environment else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text, escaped; the first cell of a row names it."""
    titles = "".join(f"<th scope=col>{esc(name)}</th>" for name in head)
    top = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    body = "".join(
        f"<tr><th scope=row>{esc(first)}</th>{''.join(f'<td>{esc(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'
