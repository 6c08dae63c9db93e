"""The machine's ceilings, in the contestants' own surroundings: how fast torch multiplies matrices and moves memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

PACKAGES = ("torch",)
SIZES = {"cpu": (512, 1024, 2048, 4096), "cuda": (1024, 4096, 8192)}
LARGE = 1 << 26  # float32 numbers: 256 MB, more than caches hold


class Gauge:
    """`gemm` and `bandwidth`, as torch has them with the job's threads on the job's device."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.device = torch.device(job["device"])
        self.seconds = float(job["seconds"])
        torch.set_num_threads(job["threads"])
        self.setting = {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def gemm(self, dtype: str) -> dict[str, float]:
        """FLOP/s of the best square product, and its size. A larger one, which takes eight times as long, is left out
        where it would take four times the time that is given."""
        best, at, taken = 0.0, 0, 0.0
        for size in SIZES[self.device.type]:
            if taken * 8 > 4 * self.seconds:
                break
            a, b = (torch.randn(size, size, device=self.device).to(getattr(torch, dtype)) for _ in range(2))
            taken = self._best(lambda a=a, b=b: a @ b)  # type: ignore[misc]
            if 2 * size**3 / taken > best:
                best, at = 2 * size**3 / taken, size
        return {"flops": best, "size": at}

    def bandwidth(self) -> dict[str, float]:
        """Bytes a second: of a copy (read and written), and of a sum (read)."""
        numbers = LARGE if self.seconds >= 0.2 else LARGE // 16
        a, b = (torch.ones(numbers, device=self.device) for _ in range(2))
        size = 4 * numbers
        return {"copy": 2 * size / self._best(lambda: b.copy_(a)), "read": size / self._best(lambda: a.sum())}

    def _best(self, work: Callable[[], Any]) -> float:
        """Seconds of the fastest of at least two runs, for about the time given, after one that warms up."""
        work()
        self._wait()
        best, end, runs = float("inf"), time.perf_counter() + self.seconds, 0
        while runs < 2 or time.perf_counter() < end:
            start = time.perf_counter()
            work()
            self._wait()
            best = min(best, time.perf_counter() - start)
            runs += 1
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
