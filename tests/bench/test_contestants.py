"""Who was asked for, and who can come."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fathom.bench import contestants
from fathom.bench.contestants import OURS, PEERS, WEIGHTS, entries
from fathom.bench.pipe import PEERS as FOLDER
from fathom.errors import ConfigError


def test_words_become_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "find_spec", lambda module: module != "mlx_lm" or None)
    names = [entry.name for entry in entries([], "decodes")[0]]
    assert names == ["transformers", "llama.cpp", "vllm"]
    assert "fathom-lm[bench]" in entries([], "decodes")[1]["mlx-lm"]
    assert entries(["none"], "decodes") == ([], {})
    assert [e.name for e in entries(["llama.cpp,transformers"], "decodes")[0]] == ["transformers", "llama.cpp"]
    assert [e.name for e in entries(["all"], "trains")[0]] == ["transformers", "litgpt"]


def test_an_interpreter_of_its_own_is_not_looked_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contestants, "find_spec", lambda module: None)
    python = tmp_path / "python"
    python.write_text("")
    python.chmod(0o755)
    found, left = entries(["all", f"vllm={python}"], "decodes")
    assert [(e.name, e.python) for e in found] == [("vllm", str(python))]
    assert set(left) == {"transformers", "llama.cpp", "mlx-lm"}
    assert entries([f"mlx-lm={sys.executable}"], "decodes")[1]  # our own interpreter is looked into


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gpt4", r"no peer gpt4; possible are all, none, transformers"),
        ("llama.cpp", "llama.cpp does not take part in this bench"),
        ("transformers=nowhere", "nowhere is no interpreter"),
        ("transformers=", "no interpreter"),
    ],
)
def test_mistakes(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        entries([word], "trains")


def test_the_table_is_whole() -> None:
    for contestant in (OURS, *PEERS.values()):
        assert contestant.trains or contestant.decodes
        for file in filter(None, (contestant.trains, contestant.decodes)):
            assert (FOLDER / f"{file}.py").is_file()
        assert bool(contestant.weights) == bool(contestant.decodes)
        assert set(contestant.weights) <= set(WEIGHTS)
