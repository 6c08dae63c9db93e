"""What attention remembers of a row, in memory that is set aside once.

A layer keeps the tensors that its attention names by `cache_widths`, nothing else: MLA C + R numbers a token, GQA the
keys and values of N_kv heads. Bytes of all layers = tokens x `Cost.cache_bytes_per_token`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.model.attention.cache import Visibility
from fathom.model.native.layers import Where
from fathom.model.transformer import ModelConfig


class Cache:
    """One layer's `LayerCache` of B rows and at most `capacity` tokens; every row has the same length."""

    def __init__(
        self, widths: Sequence[int], rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._kept = tuple(torch.empty(rows, capacity, width, dtype=dtype, device=device) for width in widths)
        self._tokens = torch.empty(rows, 0, dtype=torch.int64, device=device)
        self._length = 0
        self.capacity = capacity

    @property
    def length(self) -> int:
        """How many tokens a row has."""
        return self._length

    def places(self, new: int, device: torch.device) -> Tensor:
        """(1, T): where the next T tokens stand."""
        return torch.arange(self._length, self._length + new, device=device).unsqueeze(0)

    def visible(self, new: int, device: torch.device) -> Visibility:
        """Everything before, and the triangle of what is new."""
        return Visibility.of(new, self._length + new, None, device)

    @property
    def bytes(self) -> int:
        """Of memory that is set aside, full or not."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store (B, T, width) tensors; views of everything stored, (B, S_old + T, width), good until the next call.
        ValueError when they do not fit."""
        end = self._length + new[0].shape[1]
        self._check(end)
        for kept, part in zip(self._kept, new, strict=True):
            kept[:, self._length : end] = part
        self._length = end
        return tuple(kept[:, :end] for kept in self._kept)

    def before(self, tokens: Tensor, count: int) -> Tensor:
        """The `count` tokens before these, -1 where there were none."""
        seen = self._tokens[:, : self._length]
        self._tokens = torch.cat((seen, tokens), 1)
        return F.pad(seen[:, max(0, self._length - count) :], (max(0, count - self._length), 0), value=-1)

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """A row is a block."""
        return self._kept

    def where(self) -> Where:
        """Everything stored and the next place. ValueError: it is full."""
        self._check(self._length + 1)
        rows = len(self._tokens)
        return Where(torch.arange(rows).unsqueeze(1), torch.full((rows,), self._length + 1), self.capacity)

    def grow(self) -> None:
        """One more token of each row counts as stored."""
        self._length += 1

    def _check(self, end: int) -> None:
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, and {end} are to be stored")

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        if not 0 <= length <= self._length:
            raise ValueError(f"the cache has {self._length} tokens and cannot go back to {length}")
        self._length = length


def caches_for(
    config: ModelConfig, layers: int, rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str
) -> list[Cache]:
    """Empty caches of `layers` layers of a model."""
    return [Cache(config.cache_widths, rows, capacity, dtype, device) for _ in range(layers)]
