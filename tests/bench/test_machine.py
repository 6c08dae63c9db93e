"""Ceilings, and what contestants run under."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fathom.bench import machine
from fathom.bench.machine import Machine, Surroundings, library, surroundings
from fathom.bench.peers.gauge import Gauge
from fathom.bench.pipe import environment
from fathom.errors import ConfigError

AROUND = Surroundings(threads=1)


def made(**gemm: float) -> Machine:
    return Machine("a processor", 2, AROUND, "2", gemm, 1e10, 1e10, 0.0, False)


def test_the_gauge_measures() -> None:
    gauge = Gauge({"device": "cpu", "seconds": 0.001, "threads": 1})
    told = gauge.gemm("float32")
    assert told["flops"] > 1e7
    assert told["size"] in (512, 1024, 2048)
    assert min(gauge.bandwidth().values()) > 1e7


def test_sixteen_bits_are_held_to_the_faster_way() -> None:
    """Where bfloat16 is emulated, its products may be computed in float32; where it is native, it sets the rate."""
    slow = made(float32=60e9, bfloat16=1e9)
    assert slow.peak("bfloat16") == (60e9, "float32")
    fast = made(float32=300e9, bfloat16=2400e9)
    assert fast.peak("bfloat16") == (2400e9, "bfloat16")
    assert fast.peak("float32") == (300e9, "float32")
    assert fast.peak("int8") == (300e9, "float32")
    assert any("no instructions" in note for note in machine._notes(slow))
    assert machine._notes(fast) == []
    assert any("busy" in note for note in machine._notes(dataclasses.replace(fast, load=1.5)))
    assert fast.facts()["gemm_flops"]["bfloat16"] == 2400e9


def test_allocators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "libown.so"
    own.write_text("")
    around = surroundings(2, "cpu", str(own), 10.0)
    assert (around.threads, around.preload) == (2, own)
    assert environment(2, own)["LD_PRELOAD"] == str(own)
    assert environment(2, None).get("LD_PRELOAD") is None
    assert surroundings(None, "cpu", "system", 10.0).preload is None
    monkeypatch.setattr(machine, "PLACES", (str(tmp_path / "lib{name}*.so*"),))
    monkeypatch.setattr(machine.ctypes.util, "find_library", lambda name: None)
    (tmp_path / "libtcmalloc_minimal_debug.so.4").write_text("")
    with pytest.raises(ConfigError, match="libtcmalloc-minimal4"):
        library("tcmalloc")
    (tmp_path / "libtcmalloc_minimal.so.4").write_text("")
    assert library("tcmalloc") == tmp_path / "libtcmalloc_minimal.so.4"
    with pytest.raises(ConfigError, match="possible are system, tcmalloc, jemalloc"):
        library("mimalloc")


def test_devices() -> None:
    with pytest.raises(ConfigError, match="--device is mps; possible here are cpu"):
        surroundings(1, "mps", "system", 1.0)
