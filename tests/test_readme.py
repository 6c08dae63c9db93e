"""The README tells the truth: its commands run, its files are there, its numbers are the code's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fathom.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert targets
    assert missing == []


def test_every_file_of_the_map_is_there() -> None:
    block = re.search(r"## Where things are\n\n```\nfathom/\n(.*?)```", README, re.DOTALL)
    assert block is not None
    names = re.findall(r"(?:^|\s{2,})([a-z_]+(?:/|\.py))\s", block[1])
    assert len(names) > 12
    houses = (ROOT / "fathom", ROOT / "fathom" / "model")
    assert [n for n in names if not any((house / n).exists() for house in houses)] == []


def test_the_commands_are_those_that_there_are() -> None:
    shown = set(re.findall(r"^fathom ([a-z]+)", README, re.MULTILINE))
    assert shown <= set(COMMANDS)
    assert shown >= {"train", "generate", "chat", "eval", "plan", "report", "data", "tokenizer", "schema"}


def lines() -> list[str]:
    """Every whole command line of the README that begins with `fathom`, without placeholders."""
    found = re.findall(r"^fathom [a-z]+\b.*$", README, re.MULTILINE)
    said = [re.split(r"\s{3,}", line)[0] for line in found]
    return [line for line in said if not re.search(r"\b(RUN|CONFIG|TEXT|FILE|DIR|OUT)\b|\[--", line)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configurations and a text, as somebody has who follows the README."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "config.yaml").symlink_to(ROOT / "config.yaml")
    speech = "My fellow citizens, the state of the union is such that we may go on.\n"
    (tmp_path / "book.txt").write_text(speech * 400, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = {  # laid over every `fathom train` of the README, so that it takes seconds
    "train": [
        "training.max_steps=2",
        "training.batch_size=2",
        "training.sequence_length=32",
        "tokenizer.vocab_size=300",
        "training.sample_max_tokens=2",
        "logging.progress=quiet",
        "model.hidden_size=32",
    ]
}


@pytest.mark.parametrize("line", lines())
def test_every_command_line_runs(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)[1:]
    assert main([*words, *SMALL.get(words[0], [])]) == 0, capsys.readouterr().err


def test_the_commands_on_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the README shows with RUN, on a run that its own line about one's own text makes."""
    train = next(line for line in lines() if line.startswith("fathom train"))
    words = shlex.split(train)[1:]
    assert main([*words, *SMALL["train"]]) == 0
    run = next(word.partition("=")[2] for word in words if word.startswith("training.output_dir="))
    for command in (
        ["generate", run, "--prompt", "The state of", "--max-tokens", "3", "--greedy"],
        ["eval", run, "--text", "book.txt", "--batches", "2"],
        ["report", run],
    ):
        assert main([*command, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out.splitlines()[-1]), dict)
    assert (place / run / "report.html").stat().st_size > 10_000


def test_the_seed_has_the_parameters_that_are_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "config.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert f"{plan['parameters']:,} parameters ({plan['active_parameters']:,} active)" in README
    assert (plan["parameters"], plan["active_parameters"]) == (84_466_688, 65_592_320)
