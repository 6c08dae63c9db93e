"""Batch: the currency of training. Data makes it, the model and the trainer read it, nobody else is told about rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # a target that no loss counts; PyTorch's own ignore_index


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows and T tokens; every tensor is int64.

    tokens     (B, T)  what the model reads
    targets    (B, T)  the token after each; IGNORE where there is none (padding, or a document's end when documents
                       are kept apart)
    positions  (B, T)  rotary positions; restart at 0 with every document when documents are kept apart
    segments   (B, T)  or None: the number of the document that a token belongs to, counted in its row; tokens of
                       different segments do not see each other. None: a row is one causal stretch
    origins    (B)     or None: where each row begins in the training text, all its sources in a row, counted in tokens
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    segments: Tensor | None = None
    origins: Tensor | None = None

    @property
    def target_count(self) -> int:
        """How many targets count in the loss."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The same batch in page-locked memory, so that a copy to a GPU overlaps with compute."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        segments, origins = (None if x is None else change(x) for x in (self.segments, self.origins))
        return Batch(change(self.tokens), change(self.targets), change(self.positions), segments, origins)

    def __len__(self) -> int:
        return self.tokens.shape[0]
