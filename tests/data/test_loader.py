"""The loader: resumes exactly, refuses another order, works ahead, and its thread's errors are the consumer's."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_texts import corpus

from fathom.batch import Batch
from fathom.data.corpus import Corpus
from fathom.data.loader import DataConfig, TrainLoader
from fathom.errors import CheckpointError, DataError

DYNAMIC = {"kind": "dynamic"}
APART = {"kind": "packed", "keep_documents_apart": True}


def take(loader: TrainLoader, count: int) -> list[list[list[int]]]:
    try:
        return [next(loader).tokens.tolist() for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("batching", [{}, APART, DYNAMIC], ids=["packed", "apart", "dynamic"])
def test_a_restart_anywhere_goes_on_as_if_nothing_had_been(
    tmp_path: Path, batching: dict[str, Any], prefetch: int
) -> None:
    named = {"batching": batching} if batching else {}
    data = corpus(tmp_path, counts=(31, 11), prefetch=prefetch, **named)
    whole = take(data.train_loader(3, 17, seed=5), 20)
    for cut in (0, 1, 13):
        first = data.train_loader(3, 17, seed=5)
        before = take(first, cut)
        state = json.loads(json.dumps(first.state_dict()))
        assert state["micro_index"] == cut
        again = data.train_loader(3, 17, seed=5)
        next(again)  # the state wins over what was made ahead
        again.load_state_dict(state)
        assert before + take(again, 20 - cut) == whole


def test_ranks_share_the_batch(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    whole = take(data.train_loader(7, 17, seed=5), 4)
    parts = [take(data.train_loader(7, 17, seed=5, rank=rank, world=3), 4) for rank in range(3)]
    assert [[len(batch) for batch in part] for part in parts] == [[2] * 4, [2] * 4, [3] * 4]
    assert [[row for part in parts for row in part[i]] for i in range(4)] == whole
    with pytest.raises(DataError, match="7 rows over all ranks, and there are 8 ranks"):
        data.train_loader(7, 17, seed=5, world=8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 6}, "seed of the order 5 then, 6 now"),
        ({"batch_size": 4}, r"training\.batch_size 3 then, 4 now"),
        ({"sequence_length": 19}, r"training\.sequence_length 17 then, 19 now"),
    ],
)
def test_a_state_of_another_order_is_refused(tmp_path: Path, change: dict[str, int], words: str) -> None:
    given = {"batch_size": 3, "sequence_length": 17, "seed": 5}
    data = corpus(tmp_path)
    state = data.train_loader(**given).state_dict()
    with pytest.raises(CheckpointError, match=words):
        data.train_loader(**{**given, **change}).load_state_dict(state)


@pytest.mark.parametrize("other", [{"counts": (52,)}, {"batching": APART}, {"validation_fraction": 0.2}])
def test_a_state_of_other_data_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    state = corpus(tmp_path).train_loader(3, 17, seed=5).state_dict()
    with pytest.raises(CheckpointError, match="text, tokenizer, weights and batching"):
        corpus(tmp_path, **other).train_loader(3, 17, seed=5).load_state_dict(state)


def test_a_state_of_another_version_raises_what_the_trainer_turns_into_words(tmp_path: Path) -> None:
    loader = corpus(tmp_path).train_loader(3, 17, seed=5)
    with pytest.raises(KeyError):
        loader.load_state_dict({"micro_index": 3})
    with pytest.raises(CheckpointError, match="damaged"):
        loader.load_state_dict({**loader.state_dict(), "micro_index": -1})


def test_the_epoch_counts_batches_handed_out(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    loader = data.train_loader(3, 17, seed=5)
    assert loader.epoch == 0
    take(loader, 7)
    assert loader.epoch == pytest.approx(7 * 3 / ((data.tokens - 1) // 17))


class Broken:
    """A packing that fails at batch 2, and counts."""

    epoch_batches = 10.0

    def __init__(self) -> None:
        self.made = 0

    def batch(self, index: int, rank: int = 0, world: int = 1) -> Batch:
        if index == 2:
            raise DataError("the third batch is missing")
        self.made += 1
        one = torch.zeros(1, 1, dtype=torch.int64)
        return Batch(one, one, one)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_consumer_at_their_batch(prefetch: int) -> None:
    loader = TrainLoader(Broken(), {}, prefetch=prefetch)
    next(loader), next(loader)
    for _ in range(2):  # and again, not a hang
        with pytest.raises(DataError, match="the third batch"):
            next(loader)
    assert loader.state_dict()["micro_index"] == 2
    assert not data_threads()


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fathom-data"]


def test_prefetch_works_ahead_and_no_further() -> None:
    packing = Broken()
    packing.batch = lambda index, rank=0, world=1: counted(packing)  # type: ignore[method-assign]
    loader = TrainLoader(packing, {}, prefetch=3)
    next(loader)
    until = time.monotonic() + 5
    while packing.made < 5 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert packing.made == 5  # one taken, three waiting, one in hand
    assert all(thread.daemon for thread in data_threads())
    loader.close()
    assert not data_threads()
    loader.close()
    assert loader.state_dict() == {"micro_index": 1}


def counted(packing: Broken) -> Batch:
    packing.made += 1
    one = torch.zeros(1, 1, dtype=torch.int64)
    return Batch(one, one, one)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"datasets": []}, "at least 1 item"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"validation_fraction": 1e-9}, "at least 1e-05"),
        ({"batching": {"kind": "packed", "like": 3}}, "like"),
        ({"batching": {"kind": "sorted"}}, "sorted"),
        ({"datasets": [{"kind": "embedded", "path": "x"}]}, "path"),
        ({"prefetch": -1}, "greater than or equal to 0"),
    ],
)
def test_the_configuration_refuses(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate({"datasets": [{"kind": "embedded"}], **given})


def test_a_corpus_knows_its_text(tmp_path: Path) -> None:
    data: Corpus = corpus(tmp_path, counts=(31, 11))
    documents = [source.document(i).tolist() for source in data.shards for i in range(source.totals.documents)]
    assert data.documents == len(documents)
    assert data.tokens == sum(map(len, documents))
    texts = [bytes(d[:-1]).decode() for d in documents]
    assert data.bytes == data.tokens - data.documents == sum(len(t.encode()) for t in texts)
    assert data.words == sum(len(t.split()) for t in texts)
