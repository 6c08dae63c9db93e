"""Keeping freed memory: what the user chose stands, and where it works a large tensor is made again without faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fathom.runtime import memory

LOOK = """
import resource, torch
from fathom.runtime.memory import keep_memory
kept = keep_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(kept, min(faults() for _ in range(8)))
"""


def look(**environment: str) -> tuple[str, int]:
    plain = {k: v for k, v in os.environ.items() if k not in memory.OWN and k not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    found = subprocess.run([sys.executable, "-c", LOOK], env=plain | environment, capture_output=True, text=True)
    kept, faults = found.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="faults are counted on Linux")
def test_freed_memory_comes_again_without_faults() -> None:
    kept, faults = look()
    if kept == "False":
        pytest.skip("no glibc here")
    # 4 tensors of 64 MB, by pages of 4 kB: 65,536 faults where memory goes back; by huge pages at least 128
    assert faults < 100


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_what_the_user_chose_stands(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert memory.keep_memory() is False


def test_a_library_without_the_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*memory.OWN, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_memory() is False
