from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny_run import tiny_run

from fathom.cli.eval import evaluated
from fathom.cli.main import main
from fathom.evaluate.loss import measure
from fathom.evaluate.text import text_batches
from fathom.load import Run

TEXT = "The state of the union is strong.\n" * 9


@pytest.fixture(autouse=True)
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    own = tmp_path / "own.txt"
    own.write_text("\n\n".join(f"Some text of mine {'abcdefgh'[i % 8] * 9} and more." for i in range(40)))
    opened = tiny_run(tmp_path, own)
    monkeypatch.setattr("fathom.load.load", lambda *_: opened)
    return opened


def file(folder: Path, text: str | bytes, name: str = "a.txt") -> str:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


def test_a_text_of_ones_own(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "RUN", "--text", file(tmp_path, TEXT), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ids = run.tokenizer.encode(TEXT)
    want = measure(run.model, text_batches(ids, run.tokenizer.eos_id, 16, 2), run.tokenizer.token_bytes)
    assert found["loss"] == pytest.approx(want.loss)
    assert (found["tokens"], found["bytes"], found["words"]) == (len(TEXT) + 1, len(TEXT), len(TEXT.split()))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / found["bytes"] / math.log(2))
    assert found["word_perplexity"] == pytest.approx(math.exp(found["loss"] * found["tokens"] / found["words"]))
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]
    assert found["mtp_loss"] > 0
    assert 0 <= found["mtp_acceptance"] <= 1
    assert found["tokens_per_second"] > 0


def test_several_texts_and_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = file(tmp_path, "one text"), file(tmp_path, "another", "b.txt")
    assert main(["eval", "RUN", "--text", a, "--text", b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == len("one text") + len("another") + 2
    long = file(tmp_path, TEXT)
    options = ["--batches", "2", "--sequence-length", "5", "--batch-size", "3"]
    assert main(["eval", "RUN", "--text", long, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2 * 5 * 3


def test_tables_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "RUN", "--text", file(tmp_path, TEXT)]) == 0
    out = capsys.readouterr().out
    for words in ("bits per byte", "perplexity a word", "MTP, acceptance", "MaxVio", "after step 7", "of 6"):
        assert words in out


def test_the_runs_own_splits(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "RUN", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "validation"
    assert found["loss"] == pytest.approx(evaluated(run, "validation").loss)
    assert evaluated(run, "train").tokens > found["tokens"] > 20
    assert evaluated(run, "train", batches=1).tokens <= 32
    assert main(["eval", "RUN", "--split", "test"]) == 2
    assert "held no test text out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"", "empty"), (b" \n", "empty"), (b"\xff\xfea", "not UTF-8"), (b"a\0b", "binary"), (None, "cannot be read")],
)
def test_files_that_are_no_text(
    text: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "missing.txt") if text is None else file(tmp_path, text)
    assert main(["eval", "RUN", "--text", path]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert path in err


def test_contradictions_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(tmp_path, TEXT)
    assert main(["eval", "RUN", "--text", path, "--split", "test"]) == 2
    assert "--split test means nothing" in capsys.readouterr().err
    assert main(["eval", "RUN", "--text", path, "--sequence-length", "65"]) == 2
    assert "window holds 64" in capsys.readouterr().err
