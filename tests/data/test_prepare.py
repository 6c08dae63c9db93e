"""Preparing: made once, whole or not at all, whoever comes first, whatever stands in the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_texts import corpus, jsonl, text

from fathom import places
from fathom.data import cache, prepare
from fathom.data.corpus import has_split, open_data, training_texts
from fathom.data.loader import DataConfig
from fathom.errors import DataError
from fathom.tokenizer.train import byte, character, gpt2

FOLDER = "shards"


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that nobody else writes to."""
    monkeypatch.setenv("FATHOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / FOLDER


def config(*datasets: dict[str, Any], **said: Any) -> DataConfig:
    return DataConfig.model_validate({"datasets": list(datasets), **said})


def made(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if not p.name.endswith(".lock")) if place.exists() else []


def decoded(data: Any) -> list[str]:
    return [bytes(s.document(i)[:-1].tolist()).decode() for s in data.shards for i in range(s.totals.documents)]


def test_the_splits_are_the_text_and_made_in_one_go(tmp_path: Path, cached: Path) -> None:
    texts = [text(i) for i in range(97)]
    said = config(
        {"kind": "jsonl", "path": str(jsonl(tmp_path / "t.jsonl", texts))}, validation_fraction=0.1, test_fraction=0.2
    )
    parts = {split: decoded(open_data(said, byte(), split)) for split in ("train", "validation", "test")}
    assert sorted(sum(parts.values(), [])) == sorted(texts)  # noqa: RUF017
    assert {split: len(part) for split, part in parts.items()} == {"train": 68, "validation": 9, "test": 20}
    assert list(training_texts(said)) == parts["train"]
    assert len(made(cached)) == 1
    ends = open_data(said, byte(), "train").shards[0]
    assert all(ends.document(i)[-1] == byte().eos_id for i in range(ends.totals.documents))


def test_one_long_text_is_cut_in_every_split(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefghij" * 20)
    said = config({"kind": "text", "path": str(tmp_path / "t.txt")}, validation_fraction=0.1)
    assert decoded(open_data(said, byte(), "train")) == ["abcdefghij" * 18]
    assert decoded(open_data(said, byte(), "validation")) == ["abcdefghij" * 2]


def test_own_validation_text_is_taken_whole(tmp_path: Path, cached: Path) -> None:
    train, own = jsonl(tmp_path / "t.jsonl", [text(i) for i in range(40)]), jsonl(tmp_path / "v.jsonl", ["a b", "c"])
    said = config({"kind": "jsonl", "path": str(train), "validation_path": str(own)}, validation_fraction=0.5)
    assert open_data(said, byte(), "train").documents == 40
    assert decoded(open_data(said, byte(), "validation")) == ["a b", "c"]
    assert len(made(cached)) == 2


def test_splits_that_nobody_has(tmp_path: Path) -> None:
    first, second = (str(jsonl(tmp_path / f"{n}.jsonl", [text(i) for i in range(9)])) for n in "ab")
    said = config({"kind": "jsonl", "path": first}, validation_fraction=0.0)
    assert [has_split(said, split) for split in ("train", "validation", "test")] == [True, False, False]
    with pytest.raises(DataError, match=r"No source has validation text\. Set data\.validation_fraction"):
        open_data(said, byte(), "validation")
    both = config(
        {"kind": "jsonl", "path": first},
        {"kind": "jsonl", "path": second, "test_path": first, "weight": 2.0},
        validation_fraction=0.0,
    )
    tests = open_data(both, byte(), "test")
    assert (tests.documents, tests.weights) == (9, (2.0,))


@pytest.mark.parametrize("texts", [[], ["", " \n\t"]])
def test_an_empty_source_is_refused(tmp_path: Path, cached: Path, texts: list[str]) -> None:
    said = config({"kind": "jsonl", "path": str(jsonl(tmp_path / "t.jsonl", texts))})
    with pytest.raises(DataError, match=r"t\.jsonl has no text \(train split\)"):
        open_data(said, byte(), "train")
    assert made(cached) == []


def test_too_little_text_to_hold_any_out(tmp_path: Path, cached: Path) -> None:
    said = config({"kind": "jsonl", "path": str(jsonl(tmp_path / "t.jsonl", ["a"]))}, validation_fraction=0.1)
    with pytest.raises(DataError, match="too little text to give any to"):
        open_data(said, byte(), "train")
    assert made(cached) == []


def test_what_matters_makes_new_shards_and_nothing_else(tmp_path: Path, cached: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [text(i) for i in range(41)])
    plain = {"kind": "jsonl", "path": str(path)}

    def count(tokenizer: Any = None, source: dict[str, Any] | None = None, **said: Any) -> int:
        open_data(config({**plain, **(source or {})}, **said), tokenizer or byte(), "train")
        return len(made(cached))

    assert count() == count(source={"weight": 3.0}) == count(prefetch=0) == count(batching={"kind": "dynamic"}) == 1
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.link(path, moved / "t.jsonl")
    assert count(source={"path": str(moved / "t.jsonl")}) == 2  # its name says where from; the key is the same
    assert len({p.name[-32:] for p in made(cached)}) == 1
    assert count(validation_fraction=0.1) == 3
    assert count(source={"split_ratio": 0.5}) == 4
    assert count(gpt2()) == 5
    assert count(character([text(1)])) == 6
    jsonl(path, ["other"] * 41)
    assert count() == 7


def test_a_damaged_shard_is_made_again(tmp_path: Path, cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = corpus(tmp_path)
    before = decoded(data)
    file = next(made(cached)[0].glob("train-*.tokens"))
    file.write_bytes(file.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING, "fathom"):
        assert decoded(corpus(tmp_path)) == before
    assert "is damaged; making it again" in caplog.text
    assert len(made(cached)) == 1


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fathom.data import cache, prepare
write = prepare.write
def slow(folder, *rest):
    print("making", flush=True)
    {before}
    write(folder, *rest)
    {after}
prepare.write = slow
from small_texts import corpus
print(corpus(Path({folder!r})).tokens)
"""


def child(folder: Path, before: str = "pass", after: str = "pass") -> subprocess.Popen[str]:
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder), before=before, after=after)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_do_the_work_once(tmp_path: Path, cached: Path) -> None:
    two = [child(tmp_path, before="import time; time.sleep(0.5)") for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in two]
    assert [process.returncode for process in two] == [0, 0]
    assert sum(lines.count("making") for lines in said) == 1
    assert said[0][-1] == said[1][-1] == str(corpus(tmp_path).tokens)
    assert len(made(cached)) == 1


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_killed_maker_leaves_nothing_that_looks_finished(tmp_path: Path, cached: Path) -> None:
    process = child(tmp_path, after="print('written', flush=True); import time; time.sleep(60)")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["making\n", "written\n"]
    assert [p.suffix for p in made(cached)] == [".tmp"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert corpus(tmp_path).documents == 47
    assert [p.suffix for p in made(cached)] == [""]  # and what it left is gone


def test_who_comes_second_waits_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place, began = tmp_path / "place", threading.Event()

    def slow(folder: Path) -> None:
        began.set()
        time.sleep(0.6)
        (folder / "done").write_text("")

    def whole(folder: Path) -> bool:
        return (folder / "done").exists()

    first = threading.Thread(target=cache.made_once, args=(place, whole, slow))
    first.start()
    began.wait(5)
    with caplog.at_level(logging.INFO, "fathom"):
        cache.made_once(place, whole, lambda folder: pytest.fail("made twice"))
    first.join()
    assert "another process is making place; waiting for it" in caplog.text


@pytest.mark.parametrize("where", ["ends", "texts", "tokens", "header.json"])
def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(where):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"no space left for the cache .* FATHOM_CACHE"):
        corpus(tmp_path)
    assert made(cached) == []
    monkeypatch.setattr(os, "fsync", real)
    assert corpus(tmp_path).documents == 47


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FATHOM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written: .* Let FATHOM_CACHE name a folder"):
        corpus(tmp_path)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert places.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FATHOM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert places.cache_folder() == tmp_path / "xdg" / "fathom"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert places.cache_folder() == tmp_path / "Library" / "Caches" / "fathom"


def test_large_files_are_known_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    path.write_bytes(bytes(5 << 20))
    whole = cache.fingerprint(path)
    monkeypatch.setattr(cache, "WHOLE_FILE_HASH", 1 << 20)
    sampled = cache.fingerprint(path)
    assert sampled != whole == cache.fingerprint(path, whole=True)
    os.utime(path, (1, 1))
    assert cache.fingerprint(path) != sampled
    with pytest.raises(DataError, match="cannot be read"):
        cache.fingerprint(tmp_path / "none")


def test_progress_is_told_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(prepare, "batched", lambda texts: one_by_one(texts))
    with caplog.at_level(logging.INFO, "fathom"):
        data = corpus(tmp_path, counts=(7,), validation_fraction=0.0)
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if line.startswith("tokenizing")]) == 7
    assert f"7 documents, {data.tokens:,} tokens in" in lines[-1]


def one_by_one(texts: Iterator[str]) -> Iterator[list[str]]:
    for one in texts:
        yield [one]


def test_the_header_names_the_tokenizer(tmp_path: Path, cached: Path) -> None:
    corpus(tmp_path)
    header = json.loads((made(cached)[0] / "header.json").read_text())
    assert header["tokenizer"] == byte().fingerprint
    assert header["format"] == 1
    assert set(header["splits"]) == {"train", "validation"}
