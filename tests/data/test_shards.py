"""Shards: what is written is read, over the borders of files, in every width; damage is seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data.shards import HEADER, Shards, Totals, Writer, is_whole, token_dtype, write_header
from fathom.errors import DataError

DOCUMENTS = [([5, 6, 7, 0], "a bé"), ([0], "x"), ([9] * 11 + [0], "many words of a text")]


def write(folder: Path, documents: list[tuple[list[int], str]], vocab_size: int = 17, per_file: int = 5) -> Shards:
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder, "train", vocab_size, per_file) as writer:
        for ids, text in documents:
            writer.add(ids, text)
        write_header(folder, vocab_size, "fingerprint", {"train": writer.close()})
    return Shards(folder, "train", "a name")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shards = write(tmp_path, DOCUMENTS)
    assert shards.totals == Totals(3, 17, 5 + 1 + 20, 2 + 1 + 5)
    assert [shards.document(i).tolist() for i in range(3)] == [ids for ids, _ in DOCUMENTS]
    assert shards.texts.tolist() == [[5, 2], [1, 1], [20, 5]]
    assert shards.ends.flags.c_contiguous  # or every search for a document would copy all of them
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".tokens") == [
        f"train-0000{i}.tokens" for i in range(4)
    ]
    assert shards.size_on_disk == 17 * 2 + 3 * 24
    assert is_whole(tmp_path)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 12), st.data())
def test_any_stretch_over_any_files(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_file: int, data: st.DataObject
) -> None:
    stream = list(range(sum(lengths)))
    rest = iter(stream)
    documents = [([next(rest) for _ in range(n)], "x") for n in lengths]
    folder = tmp_path_factory.mktemp("shards")
    shards = write(folder, documents, per_file=per_file)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert shards.read(start, stop).tolist() == stream[start:stop]
    assert shards.read(start, stop).dtype == np.int64
    assert shards.ends.tolist() == np.cumsum(lengths).tolist()
    assert is_whole(folder)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (129_280, "<u4")])
def test_the_width_holds_the_largest_id(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype
    shards = write(tmp_path, [([0, vocab_size - 1], "x")], vocab_size)
    assert shards.document(0).tolist() == [0, vocab_size - 1]


def test_an_id_beyond_the_vocabulary_is_no_other_id(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        write(tmp_path, [([70_000], "x")], 257)


@pytest.mark.parametrize("damage", ["short", "long", "gone", "table", "no header", "half a header", "another format"])
def test_damage_is_seen(tmp_path: Path, damage: str) -> None:
    write(tmp_path, DOCUMENTS)
    tokens, header = tmp_path / "train-00001.tokens", tmp_path / HEADER
    said = json.loads(header.read_text())
    match damage:
        case "short":
            tokens.write_bytes(tokens.read_bytes()[:-1])
        case "long":
            tokens.write_bytes(tokens.read_bytes() + b"xx")
        case "gone":
            tokens.unlink()
        case "table":
            (tmp_path / "train.texts").write_bytes(b"")
        case "no header":
            header.unlink()
        case "half a header":
            header.write_text(header.read_text()[:40])
        case _:
            header.write_text(json.dumps({**said, "format": 2}))
    assert not is_whole(tmp_path)


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS)
    with pytest.raises(DataError, match="holds no test shards"):
        Shards(tmp_path, "test", "a name")
