"""Contestants take turns, and drop out by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_peers import PEER, Small, peer

from fathom.bench.contestants import Contestant, Entry
from fathom.bench.lanes import Field, Lane
from fathom.errors import ConfigError


@pytest.fixture
def field() -> Iterator[Field]:
    with Field(Small(threads=1, limit=20.0), {"x": "not installed"}) as field:
        yield field


def enter(field: Field, folder: Path, name: str, text: str = PEER, choose: dict[str, Any] | None = None) -> Lane | None:
    place = folder / name
    place.mkdir()
    entry = Entry(Contestant(name, None, install="pip install it"), sys.executable)
    job: dict[str, Any] = {"role": "Echo", "log": str(folder / "log")}
    return field.enter(entry, str(peer(place, text)), "float32", lambda: job, choose)


def test_turns_alternate(field: Field, tmp_path: Path) -> None:
    for name in "AB":
        enter(field, tmp_path, name)
    taken = field.in_turns(3, lambda lane, turn: lane.child.ask("say", text=f"{lane.name}{turn} ")["said"])
    assert (tmp_path / "log").read_text() == "A0 B0 A1 B1 A2 B2 "
    assert taken == {("A", "float32"): ["A0 ", "A1 ", "A2 "], ("B", "float32"): ["B0 ", "B1 ", "B2 "]}


def test_who_fails_drops_out_with_all_samples(field: Field, tmp_path: Path) -> None:
    for name in "AB":
        enter(field, tmp_path, name)

    def work(lane: Lane, turn: int) -> Any:
        return lane.child.ask("die") if (lane.name, turn) == ("B", 1) else turn

    assert field.in_turns(3, work) == {("A", "float32"): [0, 1, 2]}
    assert "GGML_ASSERT" in field.left_out["B float32"]
    assert [lane.name for lane in field.lanes.values()] == ["A"]


def test_who_cannot_begin_is_named(field: Field, tmp_path: Path) -> None:
    assert enter(field, tmp_path, "absent", "import no_such_module\n") is None
    assert field.left_out["absent"] == "not installed (no_such_module is missing): pip install it"
    assert enter(field, tmp_path, "wrong", "PACKAGES = ()\n") is None
    assert "Echo" in field.left_out["wrong float32"]

    def job() -> dict[str, Any]:
        raise ConfigError("no family holds this model")

    assert field.enter(Entry(Contestant("strange", None)), str(peer(tmp_path)), "int8", job) is None
    assert field.left_out["strange int8"] == "no family holds this model"
    assert field.left_out["x"] == "not installed"


def test_a_gpu_is_for_those_who_are_benched_on_one(tmp_path: Path) -> None:
    with Field(Small(threads=1, device="cuda"), {}) as field:
        assert enter(field, tmp_path, "cpu-only") is None
        assert "CPUs only" in field.left_out["cpu-only"]


def test_what_was_tried_leaves_nothing_behind(field: Field, tmp_path: Path) -> None:
    """The setting that was found goes into a process of its own."""
    lane = enter(field, tmp_path, "A")
    chosen = enter(field, tmp_path, "B", choose={})
    assert lane is not None
    assert chosen is not None
    assert (lane.setting, lane.tried) == ({"speed": 1}, {})
    assert (chosen.setting, chosen.tried) == ({"speed": 2}, {"slow": 0.5, "fast": 0.25})
    assert chosen.facts()["tried"] == chosen.tried
    assert chosen.child.ask("chosen_here") is False
    memory = lane.memory(1000)
    assert memory["above"] == memory["peak"] - lane.child.idle - 1000


def test_some_of_the_lanes_take_turns(field: Field, tmp_path: Path) -> None:
    lanes = [enter(field, tmp_path, name) for name in "ABC"]
    some = [lane for lane in lanes[:2] if lane is not None]
    assert list(field.in_turns(1, lambda lane, turn: turn, some)) == [("A", "float32"), ("B", "float32")]
    field.drop(some[0], Exception("gone"))
    assert list(field.in_turns(1, lambda lane, turn: turn, some)) == [("B", "float32")]
