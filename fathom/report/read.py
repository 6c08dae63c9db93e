"""Run folder -> typed tables. The columns are those of `train/metrics.py` and `train/monitor.py`.

A killed run may end in half a line, a table may be missing, a cell may be empty: what is there is read, the last half
line is dropped, an empty cell is NaN. Only a folder that is no run, or one that a newer Fathom wrote, is refused.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fathom.errors import CheckpointError
from fathom.log import log

FORMAT = 1  # of run.json; see train/checkpoint.py
Column = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Metrics:
    """metrics.csv: a row a logged step, rising. Losses in nats a token, mfu a share of 1; NaN: not measured."""

    step: Column
    tokens: Column
    epoch: Column
    train_loss: Column
    val_loss: Column
    val_bpb: Column
    mtp_loss: Column
    balance_loss: Column
    lr: Column
    grad_norm: Column
    tokens_per_second: Column
    mfu: Column
    seconds: Column


@dataclass(frozen=True)
class Hardware:
    """hardware.csv: a row every few seconds; `seconds` begins at 0 in every session."""

    step: Column
    seconds: Column
    cpu_percent: Column
    process_bytes: Column
    memory_percent: Column
    gpu_percent: Column
    gpu_memory_bytes: Column
    gpu_watts: Column
    gpu_celsius: Column


@dataclass(frozen=True)
class LayerLoad:
    """experts.csv of one MoE layer: R logged steps, E experts.

    step (R,);   load (R, E), shares since the row before, rows sum to 1;   bias (R, E)
    max_vio (R,) = (max load - mean) / mean;   entropy (R,) of the mean gate, nats;   dead, dropped (R,)
    """

    layer: int
    step: Column
    load: Column
    bias: Column
    max_vio: Column
    entropy: Column
    dead: Column
    dropped: Column

    @property
    def experts(self) -> int:
        return self.load.shape[1]

    @property
    def ratio(self) -> Column:
        """E x load (R, E): 1.0 is a fair share."""
        return self.load * self.experts


@dataclass(frozen=True)
class Sample:
    """A row of samples.csv."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl."""

    step: int
    kind: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class RunTables:
    """Everything that a report tells about a run; an absent table is empty, an absent text "", an absent object {}."""

    path: Path
    name: str
    facts: dict[str, Any]
    metrics: Metrics
    experts: tuple[LayerLoad, ...]
    samples: tuple[Sample, ...]
    hardware: Hardware
    events: tuple[Event, ...]
    config: str
    environment: dict[str, Any]


def read(path: str | os.PathLike[str]) -> RunTables:
    """Read a run folder. CheckpointError: no run, a newer format, a file that cannot be read."""
    folder = Path(path)
    facts = _run_json(folder)
    return RunTables(
        path=folder,
        name=folder.resolve().name or str(folder),
        facts=facts,
        metrics=_columns(folder / "metrics.csv", Metrics),
        experts=_experts(folder / "experts.csv"),
        samples=tuple(_samples(folder / "samples.csv")),
        hardware=_columns(folder / "hardware.csv", Hardware),
        events=tuple(_events(folder / "events.jsonl")),
        config=_text(folder / "config.yaml"),
        environment=_object(folder / "environment.json"),
    )


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[RunTables]:
    """Read several runs and make their names unique: a/demo and b/demo, where both end in demo. CheckpointError as
    `read`, and for a run that is given twice."""
    places = [Path(path).resolve() for path in paths]
    for place in places:
        if places.count(place) > 1:
            raise CheckpointError(f"{place} is given more than once; name each run once")
    names = _short_names(places)
    return [_renamed(read(path), name) for path, name in zip(paths, names, strict=True)]


def _renamed(run: RunTables, name: str) -> RunTables:
    return RunTables(**{**{f.name: getattr(run, f.name) for f in fields(run)}, "name": name})


def _short_names(places: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell it from the others."""
    names = []
    for place in places:
        others = [other.parts for other in places if other != place]
        count = 1
        while count < len(place.parts) and any(other[-count:] == place.parts[-count:] for other in others):
            count += 1
        names.append("/".join(part.strip("/\\") for part in place.parts[-count:]) or str(place))
    return names


# --- files ------------------------------------------------------------


def _run_json(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    if not file.is_file():
        if folder.is_file():
            hint = "it is a file; give the folder that training.output_dir names"
        elif not folder.exists():
            hint = "there is no such folder"
            if "@" in folder.name:
                hint += "; a report is of the whole run: leave out @ and what follows"
        else:
            hint = "it has no run.json; give the folder that training.output_dir names"
        raise CheckpointError(f"{folder} is not a run folder: {hint}")
    try:
        facts = json.loads(_text(file))
        found = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); is {folder} a run folder?") from error
    if type(found) is not int or found > FORMAT:
        raise CheckpointError(
            f"{file} has format {found}, and this Fathom knows up to {FORMAT}; install a newer fathom-lm"
        )
    return dict(facts)


def _text(file: Path) -> str:
    """A file's text, "" if there is none. Bytes that are not UTF-8 (a torn character) become U+FFFD."""
    try:
        return file.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def _object(file: Path) -> dict[str, Any]:
    text = _text(file)
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        log.warning("%s is not JSON and is left out", file)
        return {}
    return found if isinstance(found, dict) else {}


def _whole_lines(text: str) -> list[str]:
    """Lines that were written to their end. Only for files whose cells hold no line ends."""
    return [line for line in text[: text.rfind("\n") + 1].split("\n") if line.strip()]


def _numbers(file: Path) -> tuple[list[str], Column]:
    """Header and numbers (rows, columns) of a table without text; rows of another width are left out, with a word.

    CheckpointError: the table does not begin with the step.
    """
    header, *lines = _whole_lines(_text(file).replace("\r", "")) or [""]
    names = header.split(",")
    if not header:
        return [], np.empty((0, 0))
    if names[0] != "step":
        raise CheckpointError(
            f"{file} is damaged: its first line should name the columns, step first, but is {header!r}"
        )
    whole = [line for line in lines if line.count(",") == len(names) - 1]
    # numpy's reader is fast and wants a word in every cell
    filled = [",".join(cell or "nan" for cell in line.split(",")) if _has_gap(line) else line for line in whole]
    try:
        table = np.loadtxt(filled, delimiter=",", ndmin=2, comments=None) if filled else np.empty((0, len(names)))
    except ValueError:
        rows = [row for line in filled if (row := _row(line)) is not None]
        table = np.array(rows, dtype=float).reshape(len(rows), len(names))
    table = table[np.isfinite(table[:, 0])]
    if len(table) < len(lines):
        log.warning("%s: %d of %d rows cannot be read and are left out", file, len(lines) - len(table), len(lines))
    return names, table


def _has_gap(line: str) -> bool:
    return ",," in line or line[0] == "," or line[-1] == ","


def _row(line: str) -> list[float] | None:
    try:
        return [float(cell) for cell in line.split(",")]
    except ValueError:
        return None


def _columns(file: Path, kind: Callable[..., T]) -> T:
    """A table as a dataclass of columns, by step; a column that the file lacks is all NaN."""
    names, table = _numbers(file)
    if names:
        table = table[np.argsort(table[:, 0], kind="stable")]
    blank = np.full(len(table), math.nan)
    wanted = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: table[:, names.index(name)] if name in names else blank for name in wanted})


# --- experts ------------------------------------------------------------


def _experts(file: Path) -> tuple[LayerLoad, ...]:
    """By layer; a step of which only some experts were written (a kill between two lines) is left out."""
    names, table = _numbers(file)
    if not {"layer", "expert", "load"} <= set(names) or not len(table):
        return ()
    place = {name: number for number, name in enumerate(names)}
    table = table[(table[:, [place["layer"], place["expert"]]] >= 0).all(axis=1)]  # NaN is not
    layers = table[:, place["layer"]]
    found = [_layer(int(number), place, table[layers == number]) for number in np.unique(layers)]
    return tuple(layer for layer in found if layer is not None)


def _layer(number: int, place: dict[str, int], table: Column) -> LayerLoad | None:
    steps, row = np.unique(table[:, 0], return_inverse=True)
    expert = table[:, place["expert"]].astype(int)
    shape = (len(steps), int(expert.max()) + 1)
    whole = np.bincount(row, minlength=len(steps)) == shape[1]
    if not whole.any():
        return None

    def square(name: str) -> Column:
        out = np.full(shape, math.nan)
        if name in place:
            out[row, expert] = table[:, place[name]]
        return out

    shared = {name: square(name)[whole, 0] for name in ("max_vio", "entropy", "dead", "dropped")}
    return LayerLoad(number, steps[whole], square("load")[whole], square("bias")[whole], **shared)


# --- text ------------------------------------------------------------


def _samples(file: Path) -> list[Sample]:
    """Cells may hold line ends, so a torn row is one whose quotes are open, or that ends without a line end."""
    text = _text(file).replace("\0", "\ufffd")
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), strict=True):
            rows.append(row)
        torn = not text.endswith("\n")
    except csv.Error as error:
        torn = False  # the row that raised was not added
        if "unexpected end" not in str(error):
            log.warning("%s: only the first %d rows can be read (%s)", file, max(0, len(rows) - 1), error)
    if torn and rows:
        rows.pop()
    header, *rest = rows or [[]]
    if not {"step", "prompt", "generated_text"} <= set(header):
        return []
    found = [dict(zip(header, row, strict=True)) for row in rest if len(row) == len(header)]
    return [Sample(int(r["step"]), r["prompt"], r["generated_text"]) for r in found if r["step"].isdecimal()]


def _events(file: Path) -> list[Event]:
    events = []
    for line in _text(file).split("\n"):
        try:
            found = json.loads(line)
            facts = {key: value for key, value in found.items() if key not in ("step", "event")}
            events.append(Event(int(found["step"]), str(found["event"]), facts))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # torn, or not an event
            continue
    return events
