"""CSV and JSONL files that grow by rows, survive a kill in the middle of a row, and go back to a checkpoint.

The first column (and the key "step" of an event) is the step; opening a table drops the rows past the step that the
run goes on from.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fathom.errors import TrainingError
from fathom.train.checkpoint import write_whole


class Table:
    """A CSV file that grows by rows; first column: step."""

    def __init__(self, path: Path, columns: Sequence[str], after_step: int = 0) -> None:
        self.path, self.columns = path, list(columns)
        if path.exists():
            self._keep_until(after_step)
        else:
            write_whole(path, _line(self.columns).encode())

    def _keep_until(self, step: int) -> None:
        """Drop rows past a step, and a last line that was torn."""
        with self.path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        kept = [r for r in rows[1:] if len(r) == len(self.columns) and r[0].isdigit() and int(r[0]) <= step]
        write_whole(self.path, "".join(map(_line, [self.columns, *kept])).encode())

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows in one write. TrainingError when the disk refuses."""
        text = "".join(_line([_cell(row.get(column)) for column in self.columns]) for row in rows)
        append(self.path, text)

    def flush(self) -> None:
        """Bring the rows to the disk."""
        sync(self.path)


def append(path: Path, text: str) -> None:
    """Add text to a file, past the process at once. TrainingError when the disk refuses."""
    try:
        with path.open("ab") as file:
            file.write(text.encode())
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror}; the last checkpoint stands: free space, then go on with --resume"
        ) from error


def sync(path: Path) -> None:
    """Bring a file to the disk, as far as the disk lets us."""
    if path.exists():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _line(cells: Sequence[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.7g}" if math.isfinite(value) else ""
    return str(value)


def keep_events(path: Path, step: int) -> None:
    """Drop events past a step, and a last line that was torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept).encode())
