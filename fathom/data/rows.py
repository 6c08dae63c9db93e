"""A row: a stretch of a source's tokens; and rows stacked into a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from fathom.batch import IGNORE, Batch
from fathom.data.shards import Ids, Shards

PADDING = -1  # the segment of tokens that stand for nothing


class Row:
    """Tokens start .. stop - 1 of a stream of documents: the inputs and, one further on, the targets of one row.
    before: tokens of the sources before this one, if it is training text."""

    def __init__(self, source: Shards, start: int, stop: int, before: int | None = None) -> None:
        self.origin = -1 if before is None else before + start
        self.ids: Ids = source.read(start, stop)
        first, last = np.searchsorted(source.ends, [start, stop - 1], side="right")
        self.borders: Ids = np.asarray(source.ends[first:last], dtype=np.int64) - start  # where a document begins

    def __len__(self) -> int:
        return max(0, len(self.ids) - 1)

    @cached_property
    def document_numbers(self) -> Ids:
        """(T + 1): 0 for the first document of the row, 1 for the next."""
        return np.searchsorted(self.borders, np.arange(len(self.ids)), side="right").astype(np.int64)

    @cached_property
    def restarting_positions(self) -> Ids:
        """(T + 1): counted from where the document begins, or the row."""
        starts = np.concatenate([np.zeros(1, dtype=np.int64), self.borders])
        return np.arange(len(self.ids), dtype=np.int64) - starts[self.document_numbers]


def stacked(rows: Sequence[Row | None], width: int, apart: bool) -> Batch:
    """Rows of at most `width` tokens as one batch (rows, width); None is a row of padding alone.

    apart: documents do not see each other. Padding is token 0, segment -1, target IGNORE; a batch that has any has
    segments, and so has one with documents apart.
    """
    shape = (len(rows), width)
    tokens, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    positions = np.tile(np.arange(width, dtype=np.int64), (len(rows), 1))
    segments = np.full(shape, PADDING, dtype=np.int64)
    for number, row in enumerate(rows):
        if row is None:
            continue
        n = len(row)
        tokens[number, :n], targets[number, :n], segments[number, :n] = row.ids[:-1], row.ids[1:], 0
        if apart:
            document = row.document_numbers
            segments[number, :n], positions[number, :n] = document[:-1], row.restarting_positions[:-1]
            targets[number, :n][document[1:] != document[:-1]] = IGNORE
    origins = [-1 if row is None else row.origin for row in rows]
    padded = apart or bool((segments == PADDING).any())
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(segments) if padded else None,
        torch.tensor(origins) if max(origins, default=-1) >= 0 else None,
    )
