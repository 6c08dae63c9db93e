"""`fathom data` and `fathom tokenizer`: what they print, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fathom.cli.main import main
from fathom.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration with 40 documents and a text of its own for validation."""
    monkeypatch.setenv("FATHOM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.txt").write_text("".join(f"line {i}\n" for i in range(40)))
    (tmp_path / "v.txt").write_text("one two\nthree\n")
    source = f"{{kind: text, path: {tmp_path}/t.txt, validation_path: {tmp_path}/v.txt, documents: line}}"
    (tmp_path / "run.yaml").write_text(
        f"data: {{datasets: [{source}], test_fraction: 0.1}}\ntokenizer: {{kind: byte}}\n"
    )
    return tmp_path


def last(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_data_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(folder / "run.yaml"), "--json"]) == 0
    found = last(capsys)
    rows = {row["split"]: row for row in found["splits"]}
    assert list(rows) == ["train", "validation", "test"]
    assert all(row["made"] for row in rows.values())
    assert rows["train"]["documents"] + rows["test"]["documents"] == 40
    counts = [rows["validation"][key] for key in ("documents", "tokens", "bytes", "words", "bytes_on_disk")]
    assert counts == [2, 14, 12, 3, 14 * 2 + 2 * 24]
    assert found["vocab_size"] == 257
    assert main(["data", str(folder / "run.yaml"), "data.test_fraction=0.2", "--json"]) == 0
    assert [row["made"] for row in last(capsys)["splits"]] == [True, False, True]


def test_data_as_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("made", "cached"):
        assert main(["data", str(folder / "run.yaml"), "tokenizer={kind: bpe, vocab_size: 300}"]) == 0
        out = capsys.readouterr().out
        assert out.count(word) >= 3
        assert "documents" in out
        assert "validation" in out


def test_data_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.txt").write_text("\n")
    assert main(["data", str(folder / "run.yaml")]) == 2
    assert "has no text (train split)" in capsys.readouterr().err
    assert main(["data", str(folder / "none.yaml")]) == 2


@pytest.mark.parametrize(("kind", "size"), [("bpe", 260), ("character", 16 + 2)])
def test_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str], kind: str, size: int) -> None:
    out = folder / "made"
    out.mkdir()  # an empty folder will do
    options = ["--vocab-size", "260"] if kind == "bpe" else ["--kind", kind]
    assert main(["tokenizer", "train", str(folder / "t.txt"), "--out", str(out), *options, "--json"]) == 0
    assert last(capsys) == {"tokenizer": str(out), "kind": kind, "vocab_size": size}
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == size
    assert tokenizer.decode(tokenizer.encode("line 7")) == "line 7"
    override = f"tokenizer={{kind: file, path: {out}}}"
    assert main(["data", str(folder / "run.yaml"), override, "--json"]) == 0
    assert last(capsys)["vocab_size"] == size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["none.txt", "--out", "x"], "no file or folder none.txt"),
        (["t.txt", "--out", "t.txt"], "is there already"),
        (["t.txt", "--out", "."], "is there already"),
        (["t.txt", "--out", "t.txt/x"], "cannot be written"),
        (["t.txt", "--out", "x", "--kind", "character", "--vocab-size", "300"], "one token a character"),
        (["t.txt", "--out", "x", "--vocab-size", "3"], "258"),
        (["t.txt", "--out", "x", "--kind", "word"], "'bpe'"),
    ],
)
def test_tokenizer_refuses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert main(["tokenizer", "train", *options]) == 2
    assert words in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before
