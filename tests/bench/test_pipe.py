"""A contestant's process: what it says, and how it can fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_peers import PEER, peer

from fathom.bench.pipe import Absent, Child, Failed, last_words


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    with Child(peer(tmp_path), threads=3) as child:
        child.ask("open", role="Echo", log=str(tmp_path / "log"))
        yield child


def test_question_and_answer(child: Child, tmp_path: Path) -> None:
    assert child.version  # of the second package
    assert child.idle > 1e6
    assert child.ask("say", text="a\nb") == {"said": "a\nb", "threads": "3"}
    assert (tmp_path / "log").read_text() == "a\nb"
    assert "so does this" in child.said()  # and not among the answers


def test_a_failure_is_told_and_the_child_goes_on(child: Child) -> None:
    with pytest.raises(Failed, match="ValueError: of this size"):
        child.ask("fail")
    with pytest.raises(Failed, match="no attribute"):
        child.ask("nothing_of_this_name")
    assert child.ask("say", text="still here")["said"] == "still here"


def test_a_crash_is_told_with_its_last_words(child: Child) -> None:
    with pytest.raises(Failed, match="GGML_ASSERT: no"):
        child.ask("die")
    with pytest.raises(Failed, match="it stopped"):
        child.ask("say", text="x")


def test_patience_ends(child: Child) -> None:
    with pytest.raises(Failed, match=r"no answer after 0 s"):
        child.ask("sleep", limit=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_memory_is_that_of_the_child(child: Child) -> None:
    before = child.ask("memory")["now"]
    assert child.ask("grow") == 50_000_000
    child.ask("shrink")
    after = child.ask("memory")
    assert after["peak"] - before > 45_000_000 > after["now"] - before
    if child.ask("forget_peak"):
        assert child.ask("memory")["peak"] - before < 45_000_000


def test_missing_modules_and_interpreters(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="no_such_module"):
        Child(peer(tmp_path, "import no_such_module\n" + PEER))
    with pytest.raises(Failed, match="cannot be run"):
        Child(peer(tmp_path), str(tmp_path / "python"))
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\necho 'cannot execute' >&2\nexit 126\n")
    silent.chmod(0o755)
    with pytest.raises(Failed, match="cannot execute"):
        Child(peer(tmp_path), str(silent))


def test_our_file_names_hide_nobody(tmp_path: Path) -> None:
    """`fathom/bench` has a data.py and a train.py; the child's own imports must not find them."""
    text = "import importlib.util as u\nPACKAGES = ()\nclass Look:\n def __init__(self, job): pass\n"
    text += " def found(self, name): return u.find_spec(name) is not None\n"
    with Child(peer(tmp_path, text)) as child:
        child.ask("open", role="Look")
        assert not any(child.ask("found", name=name) for name in ("spread", "lanes", "pipe"))


def test_last_words() -> None:
    assert last_words("one\n\n two \n", 1) == "two"
    assert last_words("", -9) == "nothing was said (signal 9)"
