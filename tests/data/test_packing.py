"""Packing: every token a target once an epoch, documents apart where asked, the budget kept; pure in (seed, index)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_texts import corpus

from fathom.batch import IGNORE, Batch
from fathom.data.corpus import Corpus
from fathom.data.packing import Dynamic, Packed, Packing, packing
from fathom.errors import DataError
from fathom.tokenizer.train import byte

T, ROWS = 13, 5
KINDS = [Packed(), Packed(keep_documents_apart=True), Dynamic(kind="dynamic"), Dynamic(kind="dynamic", like=1)]
ids = [f"{k.kind}-{i}" for i, k in enumerate(KINDS)]


def packed(data: Corpus, config: Packed | Dynamic, seed: int = 3, rows: int = ROWS, length: int = T) -> Packing:
    return packing(config, data.shards, data.weights, rows, length, seed)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.tokens, b.tokens), (a.targets, b.targets), (a.positions, b.positions)]
    if a.segments is not None and b.segments is not None:
        pairs.append((a.segments, b.segments))
    return (a.segments is None) == (b.segments is None) and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("config", KINDS, ids=ids)
@pytest.mark.parametrize("counts", [(53,), (31, 7, 17)], ids=["one", "three"])
def test_pure_in_any_order_and_at_any_number_of_ranks(
    tmp_path: Path, config: Packed | Dynamic, counts: tuple[int, ...]
) -> None:
    data = corpus(tmp_path, counts=counts)
    one, other = packed(data, config), packed(data, config)
    batches = {i: one.batch(i) for i in range(40)}
    for i in (39, 3, 17, 3, 0):
        assert same(batches[i], other.batch(i))
    for world in (2, 3, 5):
        parts = [other.batch(11, rank, world) for rank in range(world)]
        assert all(len(part) for part in parts)
        assert torch.equal(torch.cat([part.tokens for part in parts]), batches[11].tokens)
        assert torch.equal(torch.cat([part.targets for part in parts]), batches[11].targets)
    assert not all(same(batches[i], packed(data, config, seed=4).batch(i)) for i in range(5))


@pytest.mark.parametrize("config", KINDS, ids=ids)
def test_tensors_are_what_the_currency_says(tmp_path: Path, config: Packed | Dynamic) -> None:
    made = packed(corpus(tmp_path), config)
    for index in range(30):
        batch = made.batch(index)
        tensors = [batch.tokens, batch.targets, batch.positions] + ([] if batch.segments is None else [batch.segments])
        assert all(x.dtype == torch.int64 and x.shape == batch.tokens.shape and x.is_contiguous() for x in tensors)
        assert batch.tokens.shape[1] <= T
        assert len(batch) >= ROWS
        assert batch.positions.min() >= 0
        assert batch.positions.max() < T
        assert ((batch.targets == IGNORE) | (batch.targets >= 0)).all()
        assert batch.target_count > 0


def test_a_packed_epoch_is_the_text_once(tmp_path: Path) -> None:
    """In an epoch every target of the stream comes once, but for the few that are left over at its ends."""
    data = corpus(tmp_path)
    stream = data.shards[0].read(0, data.tokens)
    made = packed(data, Packed(), rows=1)
    size = (data.tokens - 1) // T
    firsts, shifts = set(), set()
    for epoch in range(6):
        rows = [made.batch(i) for i in range(epoch * size, (epoch + 1) * size)]
        assert all(row.segments is None and row.target_count == T for row in rows)
        assert all(torch.equal(row.positions[0], torch.arange(T)) for row in rows)
        assert all(torch.equal(row.tokens[:, 1:], row.targets[:, :-1]) for row in rows)
        shift = next(
            s for s in range(T) if any(torch.equal(r.tokens[0], torch.from_numpy(stream[s : s + T])) for r in rows)
        )
        wanted = sorted(tuple(stream[shift + k * T : shift + k * T + T + 1]) for k in range(size))
        assert sorted((*row.tokens[0].tolist(), row.targets[0, -1].item()) for row in rows) == wanted
        firsts.add(tuple(rows[0].tokens[0].tolist()))
        shifts.add(shift)
    assert len(firsts) == 6
    assert len(shifts) > 1  # rows are cut elsewhere, so what is left over at the end is not always the same


def slow_segments(row: list[int], end: int) -> tuple[list[int], list[int], list[int]]:
    """Segments, positions and targets of T + 1 tokens by looking for the end-of-text token."""
    segments, positions, targets = [], [], []
    segment = position = 0
    for token, after in pairwise(row):
        segments.append(segment)
        positions.append(position)
        targets.append(IGNORE if token == end else after)
        segment, position = (segment + 1, 0) if token == end else (segment, position + 1)
    return segments, positions, targets


def test_documents_apart_against_the_slow_twin(tmp_path: Path) -> None:
    data, end = corpus(tmp_path, counts=(53, 3)), byte().eos_id
    apart, together = packed(data, Packed(keep_documents_apart=True), length=71), packed(data, Packed(), length=71)
    borders = 0
    for index in range(12):
        batch, plain = apart.batch(index), together.batch(index)
        assert torch.equal(batch.tokens, plain.tokens)
        assert batch.segments is not None
        for row in range(len(batch)):
            ids = [*plain.tokens[row].tolist(), plain.targets[row, -1].item()]
            found = [x[row].tolist() for x in (batch.segments, batch.positions, batch.targets)]
            assert tuple(found) == slow_segments(ids, end)
            borders += found[0][-1]
    assert borders > 20


@pytest.mark.parametrize("like", [1, 4, 1000])
def test_dynamic_keeps_the_budget_and_loses_nothing(tmp_path: Path, like: int) -> None:
    data, length = corpus(tmp_path, counts=(211,)), 37
    made = packed(data, Dynamic(kind="dynamic", like=like), length=length)
    documents = [data.shards[0].document(i).tolist() for i in range(data.documents)]
    wanted = sorted(tuple(d[k : k + length + 1]) for d in documents for k in range(0, len(d) - 1, length))
    count = int(made.epoch_batches)
    orders = []
    for epoch in range(3):
        found, widths = [], []
        for index in range(epoch * count, (epoch + 1) * count):
            batch = made.batch(index)
            assert batch.tokens.numel() <= ROWS * length
            assert batch.segments is not None
            real = batch.segments == 0
            assert torch.equal(batch.segments[~real], torch.full_like(batch.segments[~real], -1))
            assert torch.equal(real, batch.targets != IGNORE)
            assert real.any(dim=0).all()  # no wider than the longest
            for row in range(len(batch)):
                n = int(real[row].sum())
                if n:
                    assert batch.positions[row, :n].tolist() == list(range(n))
                    found.append((*batch.tokens[row, :n].tolist(), int(batch.targets[row, n - 1])))
            widths.append((batch.tokens.shape[1], len(batch)))
        assert sorted(found) == wanted
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]


def test_like_lengths_stand_together(tmp_path: Path) -> None:
    data = corpus(tmp_path, counts=(400,))
    waste = {}
    for like in (1, 1000):
        made = packed(data, Dynamic(kind="dynamic", like=like), length=101, rows=4)
        batches = [made.batch(i) for i in range(int(made.epoch_batches))]
        waste[like] = 1 - sum(b.target_count for b in batches) / sum(b.tokens.numel() for b in batches)
    assert waste[1] < 0.05 < waste[1000]
    assert max(len(b) for b in batches) >= 4


def test_rows_of_sources_follow_the_weights(tmp_path: Path) -> None:
    """Source k has weight k + 1, and its documents say where they are from."""
    data = corpus(tmp_path, counts=(31, 31, 31))
    made = packed(data, Packed(), rows=1, length=29)
    streams = [source.read(0, source.totals.tokens).tolist() for source in data.shards]

    def origin(row: list[int]) -> int:
        return next(k for k, s in enumerate(streams) if any(s[i : i + 29] == row for i in range(len(s) - 28)))

    counts = [0, 0, 0]
    for index in range(60):
        counts[origin(made.batch(index).tokens[0].tolist())] += 1
    assert counts == [10, 20, 30]


def test_a_source_too_short_is_refused_by_name(tmp_path: Path) -> None:
    data = corpus(tmp_path, counts=(53, 1))
    wanted = r"1\.jsonl has \d+ tokens for train, and a row needs .* 401\. .*sequence_length"
    with pytest.raises(DataError, match=wanted):
        packed(data, Packed(), length=400)
