"""Datasets of the hub, offline: local folders that `datasets` opens, and a hub that does not answer."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_texts import jsonl

from fathom.data import hub
from fathom.data.corpus import open_data, training_texts
from fathom.data.loader import DataConfig
from fathom.errors import DataError, DependencyError
from fathom.tokenizer.train import byte

pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset with two splits. `datasets` keeps its own cache in here too."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("FATHOM_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    place = tmp_path / "dataset"
    place.mkdir()
    jsonl(place / "train.jsonl", [f"row {i} of the training text" for i in range(41)])
    jsonl(place / "validation.jsonl", [f"row {i} of the validation text" for i in range(7)])
    hub.ask.cache_clear()
    return place


def config(path: Path | str, **said: Any) -> DataConfig:
    return DataConfig.model_validate({"datasets": [{"kind": "hub", "path": str(path), **said}]})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_folder(folder: Path, streaming: bool) -> None:
    said = config(folder, streaming=streaming, validation_split="validation")
    assert list(training_texts(said)) == [f"row {i} of the training text" for i in range(41)]
    assert open_data(said, byte(), "train").documents == 41
    assert open_data(said, byte(), "validation").documents == 7


def test_what_is_held_out_comes_from_the_first_share(folder: Path) -> None:
    said = config(folder, split_ratio=0.6)
    texts = list(training_texts(said))
    held = open_data(said, byte(), "validation")
    assert len(texts) + held.documents == 25
    assert max(int(text.split()[1]) for text in texts) <= 24


def test_the_shares_of_streams(folder: Path) -> None:
    said = config(folder, streaming=True, split_ratio=0.5, validation_split="validation")
    with pytest.raises(DataError, match="does not say how many rows"):
        list(training_texts(said))
    list(training_texts(config(folder)))  # counts them


def test_a_folder_that_changes_is_another_dataset(folder: Path) -> None:
    before = hub.identity(str(folder), None, "train", None, offline=True)
    assert before == hub.identity(str(folder), None, "train", None, offline=True)
    jsonl(folder / "train.jsonl", ["other"])
    assert hub.identity(str(folder), None, "train", None, offline=True) != before


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"split": "dev"}, "(?s)dev.*validation.*Correct subset or split"),
        ({"text_field": "body"}, "no column 'body'; it has text. Set text_field"),
        ({"subset": "french"}, "french"),
    ],
)
def test_wrong_names_are_answered_with_the_right_ones(folder: Path, said: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_data(config(folder, **said), byte(), "train")


@pytest.mark.parametrize("revision", [None, "main", "a" * 40])
def test_offline_what_is_not_here_is_refused_without_asking(
    folder: Path, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answer(monkeypatch, asked.append)
    with pytest.raises(DataError, match=r"is not on this machine, and the network is switched off.*kind: embedded"):
        open_data(config("nobody/nothing", revision=revision), byte(), "train")
    assert asked == []


@pytest.fixture
def online(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As far as Fathom knows, the network is there."""
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    return folder


def answer(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, path, **named: call(path))


def test_a_hub_that_does_not_answer_is_left_soon(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    answer(monkeypatch, lambda path: hang.wait(600))
    monkeypatch.setattr(hub, "PATIENCE", -0.7)  # and one second
    with pytest.raises(DataError, match="is not on this machine, and the hub cannot be reached"):
        open_data(config("nobody/nothing"), byte(), "train")
    assert not hang.is_set()  # the answer had not come when it was left
    hang.set()


def test_a_hub_that_says_no_is_believed(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError

    def refuse(path: str) -> None:
        raise HFValidationError("no such name")

    answer(monkeypatch, refuse)
    with pytest.raises(DataError, match=r"no dataset 'a//b' that you may read.*hf auth login"):
        open_data(config("a//b"), byte(), "train")


def test_shards_outlive_the_network_and_the_package(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once made, they are found by the commit that was remembered."""
    import datasets

    opened = datasets.load_dataset(str(online), split="train")
    answer(monkeypatch, lambda path: SimpleNamespace(sha="b" * 40))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, subset, **named: opened)
    first = open_data(config("some/name"), byte(), "train")

    def gone(*given: Any, **named: Any) -> None:
        raise ConnectionError("no route")

    hub.ask.cache_clear()
    answer(monkeypatch, gone)
    monkeypatch.setattr(datasets, "load_dataset", gone)
    assert open_data(config("some/name"), byte(), "train").fingerprint == first.fingerprint
    said = config("some/name").model_copy(update={"offline": True})
    monkeypatch.setattr(hub, "_datasets", lambda: pytest.fail("not needed"))
    assert open_data(said, byte(), "train").tokens == first.tokens


def test_a_connection_that_breaks_leaves_nothing(online: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    import datasets

    broken = datasets.IterableDataset.from_generator(
        rows, features=datasets.Features({"text": datasets.Value("string")})
    )
    answer(monkeypatch, lambda path: SimpleNamespace(sha="c" * 40))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, subset, **named: broken)
    with pytest.raises(DataError, match=r"Reading some/stream broke off .*Try again"):
        open_data(config("some/stream", streaming=True), byte(), "train")
    assert [p.name for p in (tmp_path / "cache" / "shards").iterdir() if not p.name.endswith(".lock")] == []


def test_the_package_may_be_absent(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DependencyError, match=r'pip install "fathom-lm\[hub\]"'):
        open_data(config("some/name"), byte(), "train")


def test_the_memory_of_commits_may_be_damaged(folder: Path) -> None:
    from fathom.data.cache import key_of
    from fathom.places import cache_folder

    place = cache_folder() / "hub" / f"{key_of(['a/b', None])}.json"
    place.parent.mkdir(parents=True)
    for text in ("", "{}", "[]", json.dumps({"commit": "d" * 40})):
        place.write_text(text)
        found = hub.commit_of("a/b", None, offline=True)
        assert found == ("d" * 40 if "commit" in text else None)
