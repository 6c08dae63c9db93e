from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run

from fathom.cli.main import main


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """Every `RUN` is the tiny one; what it was opened with."""
    calls: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> Any:
        calls.append(arguments)
        return tiny_run(tmp_path, depths=0 if arguments[0] == "no-mtp" else 1)

    monkeypatch.setattr("fathom.load.load", load)
    return calls


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["generate", "RUN", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_text_is_streamed_to_stdout(capsys: pytest.CaptureFixture[str], opened: list[Any]) -> None:
    arguments = ["-p", "the state", "--seed", "3", "--max-tokens", "9"]
    found = facts(capsys, *arguments)
    assert main(["generate", "RUN", *arguments, "--dtype", "bfloat16"]) == 0
    assert opened[-1] == ("RUN", "cpu", "bfloat16")
    assert main(["generate", "RUN", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(found["text"] + "\n")
    assert "9 tokens" in err
    assert "--seed 3" in err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "-p", "the state", "--seed", "3", "--max-tokens", "9")
    assert (found["tokens"], found["prompt_tokens"], found["seed"], found["step"]) == (9, 9, 3, 7)
    assert found["finish_reason"] == "length"
    assert found["tokens_per_second"] == pytest.approx(9 / found["seconds"])
    assert found["text"] == facts(capsys, "-p", "the state", "--seed", "3", "--max-tokens", "9")["text"]
    assert found["text"] != facts(capsys, "-p", "the state", "--seed", "4", "--max-tokens", "9")["text"]
    assert "drafted" not in found


def test_greedy_and_speculative_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    plain = facts(capsys, "-p", "abc", "--greedy")
    drafted = facts(capsys, "-p", "abc", "--greedy", "--speculative")
    assert drafted["text"] == plain["text"]
    assert drafted["drafted"] >= drafted["accepted"] >= 0
    assert drafted["drafted"] > 0


def test_stop(capsys: pytest.CaptureFixture[str]) -> None:
    text = facts(capsys, "-p", "abc", "--seed", "3")["text"]
    stop = text[4:6]
    assert len(stop) == 2
    found = facts(capsys, "-p", "abc", "--seed", "3", "--stop", stop, "--stop", "@@")
    assert found["text"] == text[: text.find(stop)]
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)


def test_a_prompt_from_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert facts(capsys, "-p", "-", "--greedy")["prompt"] == "two\nlines"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert main(["generate", "RUN", "-p", "-"]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_a_terminal_that_cannot_show_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fathom.cli.sampling import say

    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    say("a☃b")
    assert narrow.buffer.getvalue() == b"a?b"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-k", "0"], "top_k is 0"),
        (["--greedy", "--temperature", "0.5", "--top-p", "0.5"], "--temperature and --top-p"),
        (["--stop", ""], "stop is"),
        (["--prompt", "x" * 64], "shorten the prompt"),
        (["--prompt", "a\udcffb"], "not UTF-8"),
    ],
)
def test_mistakes_are_told(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = [] if "--prompt" in arguments else ["--prompt", "a"]
    assert main(["generate", "RUN", *prompt, *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


def test_speculation_needs_depths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "no-mtp", "-p", "a", "--speculative"]) == 2
    assert "MTP depths" in capsys.readouterr().err
