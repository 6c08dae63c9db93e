"""One self-contained page from one run or several: no file, font or script from elsewhere; equal runs, equal bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from fathom.errors import ConfigError
from fathom.report import parts
from fathom.report.maps import expert_maps
from fathom.report.plots import comparison, learning, machine, routing
from fathom.report.read import RunTables
from fathom.report.style import CSS, SCRIPT, policy
from fathom.report.summary import resume_steps, summarize
from fathom.report.words import esc, slug
from fathom.version import __version__

Section = tuple[str, str, str]  # id, title, HTML


def write(runs: Sequence[RunTables], output: str | os.PathLike[str] | None = None) -> Path:
    """Write the page, whole or not at all; its path: `output`, or RUN/report.html of one run, ./report.html of several.

    ConfigError: the name is not a page's, or the disk refuses.
    """
    path = Path(output) if output is not None else (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {path}: a report is an HTML page; give a name that ends in .html")
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"{path} cannot be written: {why}; choose another --output")
    text, hidden = page(runs).encode(), path.with_name(f".{path.name}.{os.getpid()}")
    try:
        hidden.write_bytes(text)
        hidden.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}; choose another --output") from error
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink(missing_ok=True)
    return path


def page(runs: Sequence[RunTables]) -> str:
    """The whole page. ValueError: no run."""
    if not runs:
        raise ValueError("a report needs a run")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    top, sections = _single(runs[0]) if len(runs) == 1 else _several(runs)
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{esc(head)}</a>' for name, head, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{esc(head)}</h2>{text}</section>\n' for name, head, text in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy()}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)} · Fathom</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f'<header><p class="eyebrow">Fathom report</p><h1>{esc(title)}</h1>{top}'
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}</main>\n'
        f"<footer>Written by Fathom {esc(__version__)} from what was left on disk.</footer>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _single(run: RunTables) -> tuple[str, list[Section]]:
    top = f'<p class="lead">{esc(parts.about(run))}</p>{parts.tiles(summarize(run))}'
    learned = parts.plots(learning(run))
    if not learned:
        learned = '<p class="note">The run has no row of metrics yet.</p>'
    return top, [
        ("learning", "Learning", learned),
        ("experts", "Experts", _experts(run)),
        ("samples", "Samples", parts.samples(run)),
        ("machine", "Optimizer and machine", parts.plots(machine(run))),
        ("events", "Events", parts.events(run, resume_steps(run))),
        ("configuration", "Configuration and environment", _settings(run)),
    ]


def _several(runs: Sequence[RunTables]) -> tuple[str, list[Section]]:
    summaries = [summarize(run) for run in runs]
    sections = [
        ("summary", "Side by side", parts.compare(runs, summaries)),
        ("differences", "What differs", parts.differences(runs)),
        ("curves", "Curves", parts.key(runs) + parts.plots(comparison(runs))),
    ]
    return parts.key(runs), [*sections, *(_below(run, number) for number, run in enumerate(runs))]


def _below(run: RunTables, number: int) -> Section:
    """What is a run's own, under the comparison."""
    pieces = [
        ("Experts", _experts(run, slug(number))),
        ("Samples", parts.samples(run)),
        ("Events", parts.events(run, resume_steps(run))),
        ("Configuration and environment", _settings(run)),
    ]
    told = "".join(f"<h3>{head}</h3>{text}" for head, text in pieces if text)
    return slug(number, "run"), run.name, f'<p class="lead">{esc(parts.about(run))}</p>{told}'


def _experts(run: RunTables, prefix: str = "") -> str:
    if not run.experts:
        return ""
    words = (
        "<p>Every map is one MoE layer: a row is an expert, a column some steps, the colour the expert's load as a "
        "multiple of a fair share. Blank is fair, warm too much, cold too little; the bars tell where it ended.</p>"
    )
    curves = parts.plots(routing(run.experts, prefix))
    return words + parts.scale() + parts.plots(expert_maps(run.experts, prefix)) + curves


def _settings(run: RunTables) -> str:
    told = ""
    if run.config:
        told += f"<details><summary>config.yaml</summary><pre>{esc(run.config)}</pre></details>"
    if run.environment:
        told += f"<details><summary>environment.json</summary>{parts.environment(run)}</details>"
    return told
