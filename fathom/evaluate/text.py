"""Text behind tokens: how many bytes and words targets are worth, and a text as batches.

A word is what `bytes.split()` finds: a run of bytes without ASCII white space. A target begins as many words as it has
bytes that are not white space after one that is; its first byte counts if the token before it ended in white space, or
was special (a document begins). So the sum over a text is its number of words, wherever tokens are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fathom.batch import IGNORE, Batch

SPACES = b" \t\n\r\x0b\x0c"


class TextTable:
    """Facts of each token, looked up by id; ids beyond the table (padding of V) are worth nothing."""

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int, device: torch.device | str = "cpu") -> None:
        padded = [*token_bytes, *[b""] * (vocab_size - len(token_bytes))]

        def table(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self._bytes = table([len(b) for b in padded])
        self._inside = table([len(b.split()) - (b[:1].strip() != b"") for b in padded])  # words after the first byte
        self._opens = table([int(b[:1].strip() != b"") for b in padded])
        self._closes = table([int(not b or b[-1] in SPACES) for b in padded])

    def count(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(bytes, words) () int64 of the targets of a batch."""
        counted = batch.targets != IGNORE
        targets, before = batch.targets[counted], batch.tokens[counted]
        words = self._inside[targets] + self._opens[targets] * self._closes[before]
        return self._bytes[targets].sum(), words.sum()


def text_batches(ids: Sequence[int], end: int, length: int, rows: int) -> Iterator[Batch]:
    """One text as batches of at most `rows` rows of T = length tokens, the rest as a shorter row of its own.

    The text stands between two end-of-text tokens, as a document does in training: all its tokens are targets once, and
    so is the second end. A row sees nothing of the one before.
    """
    stream = torch.tensor([end, *ids, end])
    whole = (len(stream) - 1) // length
    inputs, targets = stream[:-1], stream[1:]
    for first in range(0, whole, rows):
        count = min(rows, whole - first)
        cut = slice(first * length, (first + count) * length)
        yield _batch(inputs[cut].view(count, length), targets[cut].view(count, length))
    if len(inputs) > whole * length:
        yield _batch(inputs[None, whole * length :], targets[None, whole * length :])


def _batch(tokens: Tensor, targets: Tensor) -> Batch:
    return Batch(tokens, targets, torch.arange(tokens.shape[1]).expand_as(tokens))
