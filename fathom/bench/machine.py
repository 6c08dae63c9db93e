"""What this machine can do at best, measured at the beginning of every bench, and what the contestants run under."""

from __future__ import annotations

import ctypes.util
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fathom.bench.pipe import PEERS, Child
from fathom.errors import ConfigError
from fathom.runtime.device import cpu_has_bfloat16, device_name

PLACES = (
    "/usr/lib/*/lib{name}*.so*",
    "/usr/lib/lib{name}*.so*",
    "/usr/local/lib/lib{name}*.so*",
    "/opt/homebrew/lib/lib{name}*.dylib",
)
LIBRARIES = {"tcmalloc": ("tcmalloc_minimal", "tcmalloc"), "jemalloc": ("jemalloc",)}


@dataclass(frozen=True)
class Surroundings:
    """What all contestants share. preload: the allocator's library, or None for the system's own."""

    threads: int
    device: str = "cpu"
    allocator: str = "system"
    preload: Path | None = None
    limit: float = 300.0

    def child(self, peer: str, python: str, **extra: str) -> Child:
        """A contestant's process; peer: the name of its file."""
        return Child(
            PEERS / f"{peer}.py", python, threads=self.threads, preload=self.preload, extra=extra, limit=self.limit
        )


def surroundings(threads: int | None, device: str, allocator: str, limit: float) -> Surroundings:
    """Checked. allocator: system, tcmalloc, jemalloc, or the path of a library. ConfigError: there is none of that
    name, or no such device."""
    if device != "cpu" and not (device.partition(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ConfigError(f"--device is {device}; possible here are cpu" + (", cuda" * torch.cuda.is_available()))
    preload = None if allocator == "system" else library(allocator)
    return Surroundings(threads or torch.get_num_threads(), device, allocator, preload, limit)


def library(allocator: str) -> Path:
    """Where an allocator's shared library is. ConfigError: nowhere."""
    if allocator not in LIBRARIES:
        if Path(allocator).is_file():
            return Path(allocator).resolve()
        raise ConfigError(
            f"--allocator is {allocator}; possible are system, {', '.join(LIBRARIES)}, or the path of a shared library"
        )
    for name in LIBRARIES[allocator]:
        found = [path for place in PLACES for path in sorted(glob.glob(place.format(name=name)))]
        found = [path for path in found if "debug" not in path]
        if found:
            return Path(found[0])
        known = ctypes.util.find_library(name)
        if known and os.path.isabs(known):
            return Path(known)
    raise ConfigError(
        f"--allocator {allocator}: no such library was found; install it (Debian: libtcmalloc-minimal4 or "
        "libjemalloc2) or give its path"
    )


@dataclass(frozen=True)
class Machine:
    """gemm: FLOP/s of the best square product by dtype; copy, read: bytes a second; load: processes that wanted a core
    in the minute before."""

    name: str
    cores: int
    around: Surroundings
    torch: str
    gemm: dict[str, float]
    copy: float
    read: float
    load: float | None
    native_bfloat16: bool
    notes: tuple[str, ...] = field(default=())

    def peak(self, precision: str) -> tuple[float, str]:
        """The rate that a contestant of this precision is held to, and its dtype: 16-bit products may always be
        computed in float32 instead, so the faster of the two counts."""
        rates = {dtype: self.gemm[dtype] for dtype in (precision, "float32") if dtype in self.gemm}
        best = max(rates, key=lambda dtype: rates[dtype])
        return rates[best], best

    def fast(self, dtype: str) -> bool:
        """Whether torch multiplies this dtype at least as fast as float32, as far as it was measured."""
        return self.gemm.get(dtype, self.gemm["float32"]) >= self.gemm["float32"]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        around = self.around
        return {
            "processor": self.name,
            "cores": self.cores,
            "threads": around.threads,
            "device": around.device,
            "allocator": around.allocator,
            "torch": self.torch,
            "gemm_flops": self.gemm,
            "copy_bytes_per_second": self.copy,
            "read_bytes_per_second": self.read,
            "load": self.load,
            "native_bfloat16": self.native_bfloat16,
            "notes": list(self.notes),
        }


def measured(around: Surroundings, precisions: Sequence[str], quick: bool) -> Machine:
    """Measure now. precisions: dtypes that contestants compute in; float32 always is."""
    import sys

    with around.child("gauge", sys.executable) as child:
        made = child.ask(
            "open", role="Gauge", threads=around.threads, device=around.device, seconds=0.02 if quick else 0.5
        )
        wanted = dict.fromkeys(["float32", *(p for p in precisions if p in ("bfloat16", "float16"))])
        gemm = {dtype: float(child.ask("gemm", dtype=dtype)["flops"]) for dtype in wanted}
        moved = child.ask("bandwidth")
    where = torch.device(around.device)
    native = cpu_has_bfloat16() if where.type == "cpu" else True
    machine = Machine(
        device_name(where), os.cpu_count() or 1, around, made["setting"]["torch"], gemm,
        float(moved["copy"]), float(moved["read"]), load(), native,
    )  # fmt: skip
    return Machine(**{**vars(machine), "notes": tuple(_notes(machine))})


def load() -> float | None:
    """Processes that wanted a core, mean of the last minute; None where it is not told."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def _notes(machine: Machine) -> list[str]:
    found = []
    if not machine.fast("bfloat16"):
        found.append(
            f"bfloat16 products run at {machine.gemm['bfloat16'] / 1e9:,.1f} GFLOP/s here and float32 at "
            f"{machine.gemm['float32'] / 1e9:,.0f}: this processor has no instructions for them. In training "
            "Fathom computes them in float32 and rounds; whoever calls torch's own is slowed down by that much. Read "
            "float32 against float32."
        )
    if machine.load is not None and machine.load > 0.5:
        found.append(f"the machine was busy before the bench began (load {machine.load:.1f}): absolute figures suffer")
    return found
