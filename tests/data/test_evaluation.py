"""Evaluation: every target once, in document order, the same batches at any number of ranks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from small_texts import corpus

from fathom.batch import IGNORE, Batch
from fathom.data.corpus import Corpus
from fathom.tokenizer.train import byte

CASES = [
    {"batching": {"kind": "packed", "keep_documents_apart": True}},
    {"batching": {"kind": "dynamic"}},
    {},
]


def pairs(batches: list[Batch]) -> list[tuple[int, int]]:
    """(token, target) of everything that counts, in order."""
    found = []
    for batch in batches:
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            found += [(a, b) for a, b in zip(tokens, targets, strict=True) if b != IGNORE]
    return found


def held_out(folder: Path, **data: Any) -> Corpus:
    return corpus(folder, "validation", counts=(97, 41), validation_fraction=0.3, **data)


@pytest.mark.parametrize("data", CASES, ids=["apart", "dynamic", "packed"])
@pytest.mark.parametrize(("rows", "length"), [(1, 7), (3, 29), (64, 10_007)])
def test_every_target_once_in_order(tmp_path: Path, data: dict[str, Any], rows: int, length: int) -> None:
    text = held_out(tmp_path, **data)
    batches = list(text.evaluation_batches(rows, length))
    wanted = []
    for source in text.shards:
        if data:
            for number in range(source.totals.documents):
                wanted += list(pairwise(source.document(number).tolist()))
        else:
            wanted += list(pairwise(source.read(0, source.totals.tokens).tolist()))
    assert pairs(batches) == wanted
    assert all(batch.tokens.shape[1] == length and 1 <= len(batch) <= rows for batch in batches)
    end = byte().eos_id
    for batch in batches:
        if batch.segments is None:
            continue
        padding = batch.segments < 0
        assert (batch.targets[padding] == IGNORE).all()
        if not data:
            assert (batch.targets[~padding] != IGNORE).all()
        else:
            assert ((batch.targets == IGNORE) == (padding | (batch.tokens == end))).all()


@pytest.mark.parametrize("limit", [None, 1, 4, 10_000])
def test_ranks_share_the_same_batches(tmp_path: Path, limit: int | None) -> None:
    text = held_out(tmp_path)
    whole = [b.tokens.tolist() for b in text.evaluation_batches(3, 17, limit)]
    for world in (1, 2, 5):
        parts = [
            [b.tokens.tolist() for b in text.evaluation_batches(3, 17, limit, rank, world)] for rank in range(world)
        ]
        assert [parts[i % world][i // world] for i in range(len(whole))] == whole
        assert sum(map(len, parts)) == len(whole)


def test_a_limit_is_spread_evenly(tmp_path: Path) -> None:
    text = held_out(tmp_path)
    everything = [b.tokens.tolist() for b in text.evaluation_batches(2, 29)]
    some = [b.tokens.tolist() for b in text.evaluation_batches(2, 29, limit=7)]
    places = [everything.index(one) for one in some]
    assert len(some) == 7
    assert places[0] == 0
    gaps = [b - a for a, b in pairwise([*places, len(everything)])]
    assert max(gaps) - min(gaps) <= 1
