"""Evaluation: held-out text in document order, every target once. The batches are the same at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fathom.batch import Batch
from fathom.data.rows import Row, stacked
from fathom.data.shards import Shards


def evaluation_rows(source: Shards, length: int) -> int:
    """How many rows of T targets a source has; the last may be short."""
    return -(-(source.totals.tokens - 1) // length)


def evaluation_batches(
    shards: Sequence[Shards],
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    apart: bool = False,
) -> Iterator[Batch]:
    """Batches of at most batch_size rows of T = sequence_length tokens; batch i goes to rank i mod world.

    The sources follow each other. The first token of a source is no target (there is nothing before it); with documents
    apart, no document's first token is. A source's last row is padded with segment -1 and target IGNORE. limit: take so
    many batches, evenly spaced.
    """
    counts = [evaluation_rows(source, sequence_length) for source in shards]
    total = -(-sum(counts) // batch_size)
    chosen = range(total) if limit is None or limit >= total else [k * total // limit for k in range(limit)]
    for number, batch in enumerate(chosen):
        if number % world == rank:
            rows = range(batch * batch_size, min((batch + 1) * batch_size, sum(counts)))
            yield stacked([_row(shards, counts, row, sequence_length) for row in rows], sequence_length, apart)


def _row(shards: Sequence[Shards], counts: Sequence[int], number: int, length: int) -> Row:
    for source, count in zip(shards, counts, strict=True):
        if number < count:
            start = number * length
            return Row(source, start, min(start + length + 1, source.totals.tokens))
        number -= count
    raise IndexError("a row beyond the last")
