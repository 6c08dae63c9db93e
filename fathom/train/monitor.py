"""hardware.csv: what the machine did, sampled by a thread of its own.

step; seconds of this session; cpu_percent of all cores together (0 to 100); process_bytes, resident memory of this
process; memory_percent of the machine; gpu_percent, gpu_memory_bytes taken by this process, gpu_watts and gpu_celsius
where there is a CUDA device that tells.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

from fathom.errors import TrainingError
from fathom.train.callbacks import Callback, StepReport
from fathom.train.tables import Table

COLUMNS = [
    "step",
    "seconds",
    "cpu_percent",
    "process_bytes",
    "memory_percent",
    "gpu_percent",
    "gpu_memory_bytes",
    "gpu_watts",
    "gpu_celsius",
]


class Monitor(Callback):
    """Samples every `seconds`, from the start of a run to its end."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.step = 0
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None

    def on_start(self, step: int, max_steps: int) -> None:
        self.step, self.table, self.begin = step, Table(self.path, COLUMNS, step), time.monotonic()
        self.stop.clear()
        self.thread = threading.Thread(target=self._watch, name="fathom-monitor", daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        psutil.cpu_percent()  # the first call only marks where to count from
        while not self.stop.wait(self.seconds):
            row = {
                "step": self.step,
                "seconds": time.monotonic() - self.begin,
                "cpu_percent": psutil.cpu_percent(),
                "process_bytes": process.memory_info().rss,
                "memory_percent": psutil.virtual_memory().percent,
                **gpu_facts(),
            }
            try:
                self.table.add(row)
            except TrainingError:  # a full disk is reported by those whose rows matter
                return

    def on_step(self, report: StepReport) -> None:
        self.step = report.step

    def on_end(self, step: int) -> None:
        self.stop.set()
        if self.thread is not None:
            self.thread.join(timeout=5)


def gpu_facts() -> dict[str, Any]:
    """Facts of the current CUDA device, as far as it tells; empty on CPU."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    facts: dict[str, Any] = {"gpu_memory_bytes": torch.cuda.memory_reserved()}
    for name, ask in (
        ("gpu_percent", lambda: torch.cuda.utilization()),
        ("gpu_watts", lambda: torch.cuda.power_draw() / 1000),
        ("gpu_celsius", lambda: torch.cuda.temperature()),
    ):
        with contextlib.suppress(Exception):  # these need a driver library that not every machine has
            facts[name] = ask()
    return facts
