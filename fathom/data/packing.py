"""Rows -> `Batch`: a union by kind, and how each makes micro-batch i. Pure functions of (seed, i).

Packed    row r of a source is T + 1 tokens of its stream of documents, the last of which the next row begins with: no
          padding, and all tokens but less than a row are targets once an epoch. Draw k of the mixture is row k of the
          run.
Dynamic   one document a row, documents of like length together, padded to the longest of them. A document longer than T
          is cut into pieces of T. A batch has as many rows as batch_size x T tokens allow, padding counted. A draw of
          the mixture is a whole batch of one source.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fathom.batch import Batch
from fathom.data.mixture import Mixture, permuted
from fathom.data.rows import Row, stacked
from fathom.data.shards import Ids, Shards
from fathom.errors import DataError
from fathom.knobs import Knobs
from fathom.runtime.seed import stream


class Packed(Knobs):
    """Rows are cut from the stream of documents, without padding."""

    kind: Literal["packed"] = "packed"
    keep_documents_apart: bool = False
    """Attention, positions, targets and MTP stop at the borders of documents."""


class Dynamic(Knobs):
    """One document a row, documents of like length together, up to batch_size x sequence_length tokens."""

    kind: Literal["dynamic"]
    like: int = Field(default=32, ge=1)
    """Lengths count as alike when they round up to the same multiple of this: more is more chance, and more padding."""


BatchingConfig = Annotated[Packed | Dynamic, Field(discriminator="kind")]


class Packing(Protocol):
    """How shards become micro-batches."""

    @property
    def epoch_batches(self) -> float:
        """Micro-batches that hold as many rows as the sources have."""

    def batch(self, index: int, rank: int = 0, world: int = 1) -> Batch:
        """The rank's rows of micro-batch `index`."""


def packing(
    config: Packed | Dynamic,
    shards: Sequence[Shards],
    weights: Sequence[float],
    batch_size: int,
    length: int,
    seed: int,
) -> Packing:
    """The packing of a configuration. weights: of the sources; length: T. DataError: a source that is too short."""
    if isinstance(config, Dynamic):
        return DynamicPacking(config, shards, weights, batch_size, length, seed)
    return StreamPacking(config, shards, weights, batch_size, length, seed)


def share(rows: int, rank: int, world: int) -> range:
    """The rows of a batch that a rank has."""
    return range(rank * rows // world, (rank + 1) * rows // world)


def before(shards: Sequence[Shards]) -> list[int]:
    """Tokens of the sources before each."""
    return [0, *accumulate(source.totals.tokens for source in shards)][:-1]


class StreamPacking:
    """`Packed`. What is left over at the end of a source is at its start in another epoch."""

    def __init__(
        self,
        config: Packed,
        shards: Sequence[Shards],
        weights: Sequence[float],
        batch_size: int,
        length: int,
        seed: int,
    ) -> None:
        for source in shards:
            if source.totals.tokens <= length:
                raise DataError(
                    f"{source.name} has {source.totals.tokens:,} tokens for {source.split}, and a row needs "
                    f"training.sequence_length + 1 = {length + 1:,}. Give more text, or lower training.sequence_length."
                )
        self.apart, self.shards = config.keep_documents_apart, shards
        self.rows, self.length, self.seed = batch_size, length, seed
        self._before = before(shards)
        self._left = [(source.totals.tokens - 1) % length for source in shards]
        self._mixture = Mixture([(source.totals.tokens - 1) // length for source in shards], weights, seed)

    @property
    def epoch_batches(self) -> float:
        """Micro-batches that hold as many rows as the sources have."""
        return sum(self._mixture.sizes) / self.rows

    def batch(self, index: int, rank: int = 0, world: int = 1) -> Batch:
        """(rows of the rank, T) of micro-batch `index`."""
        mine = share(self.rows, rank, world)
        return stacked([self._row(index * self.rows + row) for row in mine], self.length, self.apart)

    def _row(self, number: int) -> Row:
        draw = self._mixture.draw(number)
        shift = stream(self.seed, "data", "shift", draw.source, draw.epoch) % (self._left[draw.source] + 1)
        start = shift + draw.item * self.length
        return Row(self.shards[draw.source], start, start + self.length + 1, self._before[draw.source])


class DynamicPacking:
    """`Dynamic`. Which lengths stand together is fixed; which documents of like length do changes with every epoch."""

    def __init__(
        self,
        config: Dynamic,
        shards: Sequence[Shards],
        weights: Sequence[float],
        batch_size: int,
        length: int,
        seed: int,
    ) -> None:
        self.rows, self.length, self.seed = batch_size, length, seed
        self._before = before(shards)
        self._sources = [_ByLength(source, config.like, batch_size, length) for source in shards]
        self._mixture = Mixture([len(source.starts) for source in self._sources], weights, seed)

    @property
    def epoch_batches(self) -> float:
        """Micro-batches that hold as many rows as the sources have."""
        return float(sum(self._mixture.sizes))

    def batch(self, index: int, rank: int = 0, world: int = 1) -> Batch:
        """(rows of the rank, length of the longest row) of micro-batch `index`; at least batch_size rows over all
        ranks, of padding alone if need be, so that every rank has some."""
        draw = self._mixture.draw(index)
        source = self._sources[draw.source]
        pieces = source.pieces(draw.item, stream(self.seed, "data", "like", draw.source, draw.epoch))
        width = max(stop - start for start, stop in pieces) - 1
        rows: list[Row | None] = [None] * max(self.rows, len(pieces))
        mine = share(len(rows), rank, world)
        for number in mine[: max(0, len(pieces) - mine.start)]:
            rows[number] = Row(source.shards, *pieces[number], self._before[draw.source])
        return stacked(rows[mine.start : mine.stop], width, apart=True)


class _ByLength:
    """Pieces of a source's documents, longest first, cut into batches.

    order   pieces by their rounded length, longest first
    starts  where each batch begins in it
    """

    def __init__(self, source: Shards, like: int, batch_size: int, length: int) -> None:
        self.shards, self.length = source, length
        sizes: Ids = np.diff(np.asarray(source.ends, dtype=np.int64), prepend=0).astype(np.int64)
        parts = -(-(sizes - 1) // length)  # pieces of each document
        self._ends = np.cumsum(parts)
        count = int(self._ends[-1])
        if not count:
            raise DataError(f"{source.name} has no document of two tokens for {source.split}. Give longer documents.")
        owner = np.repeat(np.arange(len(sizes)), parts)
        within = np.arange(count) - (self._ends - parts)[owner]
        targets = np.minimum(length, sizes[owner] - 1 - within * length)
        rounded = np.minimum(length, -(-targets // like) * like)
        self.order: NDArray[np.int64] = np.argsort(-rounded, kind="stable")
        self._rounded = rounded[self.order]
        kinds = np.unique(self._rounded, return_index=True, return_counts=True)
        self._runs = {int(n): (int(first), int(many)) for n, first, many in zip(*kinds, strict=True)}
        self.starts: list[int] = []
        place = 0
        while place < count:
            self.starts.append(place)
            place += batch_size * length // int(self._rounded[place])

    def pieces(self, number: int, key: int) -> list[tuple[int, int]]:
        """(start, stop) in the stream, target of the last token included, of every row of batch `number`."""
        stop = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.order)
        return [self._piece(self._shuffled(place, key)) for place in range(self.starts[number], stop)]

    def _shuffled(self, place: int, key: int) -> int:
        """The piece at a place, those of like length being permuted among themselves."""
        first, many = self._runs[int(self._rounded[place])]
        return int(self.order[first + permuted(place - first, many, key)])

    def _piece(self, piece: int) -> tuple[int, int]:
        document = int(np.searchsorted(self._ends, piece, side="right"))
        begin = int(self.shards.ends[document - 1]) if document else 0
        before = int(self._ends[document - 1]) if document else 0
        start = begin + (piece - before) * self.length
        return start, min(start + self.length + 1, int(self.shards.ends[document]))
