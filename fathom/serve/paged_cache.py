"""The paged cache: for every layer one tensor of blocks, and views of it that the model takes for a cache.

                                                                     Kwon et al. 2023 (PagedAttention)

A block holds `size` tokens, W numbers each: C + R for MLA (latent and rotary key), 2 N_kv H for GQA. Bytes of all
layers = blocks x size x `Cost.cache_bytes_per_token`. MTP depths have layers of their own after those of the trunk.
One block more than can be taken is there for padding to be written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fathom.model.attention.cache import Visibility
from fathom.model.native.layers import Where


class Pages:
    """The numbers of all blocks. widths: of the tensors that a layer keeps for a token."""

    def __init__(
        self,
        widths: Sequence[int],
        layers: int,
        blocks: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.widths, self.blocks, self.size = tuple(widths), blocks, size
        # zeros: what nobody wrote is hidden by masks, and 0 x NaN would be NaN
        self.layers = [torch.zeros(blocks + 1, size, sum(widths), dtype=dtype, device=device) for _ in range(layers)]
        self._parts = [layer.split(self.widths, -1) for layer in self.layers]

    @property
    def bytes(self) -> int:
        """Of all blocks that can be taken."""
        return sum(layer[:-1].numel() * layer.element_size() for layer in self.layers)

    def rows(
        self,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        past: Sequence[Sequence[int]] = (),
    ) -> Rows:
        """A pass over rows of these blocks."""
        return Rows(tables, starts, counts, self.size, self.blocks, self.layers[0].device, past)

    def view(self, layers: Sequence[int], rows: Rows) -> list[PagedLayer]:
        """What the model is handed for a pass: a cache a layer."""
        return [PagedLayer(self.layers[i], self._parts[i], rows) for i in layers]


@dataclass(frozen=True)
class Rows:
    """One pass over B rows of up to T new tokens.

    tables  of each row: its blocks, enough for start + count tokens
    starts  how many tokens each row has in the cache
    counts  how many new ones it has; the rest of its T is padding
    past    some tokens before those, for a model that asks for them
    """

    tables: Sequence[Sequence[int]]
    starts: Sequence[int]
    counts: Sequence[int]
    size: int
    spare: int
    device: torch.device
    past: Sequence[Sequence[int]] = ()

    @cached_property
    def new(self) -> int:
        """T."""
        return max(self.counts)

    @cached_property
    def seen(self) -> int:
        """S: the most tokens that a row has with its new ones."""
        return max(start + count for start, count in zip(self.starts, self.counts, strict=True))

    def tokens(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Each row's new tokens as (B, T), 0 at padding."""
        return torch.tensor([[*text, *[0] * (self.new - len(text))] for text in texts], device=self.device)

    @cached_property
    def real(self) -> Tensor | None:
        """(B, T): false at padding; None if there is none."""
        if min(self.counts) == self.new:
            return None
        counts = torch.tensor(self.counts, device=self.device).unsqueeze(-1)
        return torch.arange(self.new, device=self.device) < counts

    @cached_property
    def places(self) -> Tensor:
        """(B, T)."""
        starts = torch.tensor(self.starts, device=self.device).unsqueeze(-1)
        return starts + torch.arange(self.new, device=self.device)

    @cached_property
    def visible(self) -> Visibility:
        """Everything before a token in its own row. Padding looks at what lies before it too, so that no row of scores
        is hidden as a whole."""
        if len(set(self.starts)) == 1 and self.real is None:
            return Visibility.of(self.new, self.seen, None, self.device)
        mask = torch.arange(self.seen, device=self.device) <= self.places.unsqueeze(-1)
        return Visibility(mask.unsqueeze(1), causal=False)

    @cached_property
    def slots(self) -> Tensor:
        """(B T): where new tokens are written, counted in tokens from the first block's beginning."""
        size, slots = self.size, list[int]()
        for table, start, count in zip(self.tables, self.starts, self.counts, strict=True):
            slots += [table[p // size] * size + p % size for p in range(start, start + count)]
            slots += [self.spare * size] * (self.new - count)
        return torch.tensor(slots, device=self.device)

    @cached_property
    def run(self) -> int | None:
        """The first block, if there is one row and its blocks lie side by side: they are then a view."""
        if len(self.tables) != 1:
            return None
        table = self.tables[0][: -(-self.seen // self.size)]
        return table[0] if all(b == table[0] + i for i, b in enumerate(table)) else None

    @cached_property
    def where(self) -> Where:
        """Where the tokens of each row lie, the new ones too."""
        lengths = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        return Where(self.gathered.view(len(lengths), -1), torch.tensor(lengths), self.size)

    @cached_property
    def gathered(self) -> Tensor:
        """(B n): the blocks of all rows, the spare one where a row has fewer than n."""
        n = -(-self.seen // self.size)
        padded = [b for table in self.tables for b in [*table[:n], *[self.spare] * (n - len(table))]]
        return torch.tensor(padded, device=self.device)


class PagedLayer:
    """One layer's blocks as a `LayerCache` of some rows."""

    def __init__(self, pages: Tensor, memory: tuple[Tensor, ...], rows: Rows) -> None:
        self.pages, self.memory, self.rows = pages, memory, rows

    def places(self, new: int, device: torch.device) -> Tensor:
        """(B, T)."""
        return self.rows.places

    def visible(self, new: int, device: torch.device) -> Visibility:
        """The rows' own past."""
        return self.rows.visible

    def before(self, tokens: Tensor, count: int) -> Tensor:
        """The `count` tokens before the new ones, -1 where there were none."""
        cut = [list(row[max(0, len(row) - count) :]) for row in self.rows.past or [()] * len(tokens)]
        padded = [[-1] * (count - len(row)) + row for row in cut]
        return torch.tensor(padded, dtype=torch.int64, device=tokens.device).view(len(tokens), count)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Write (B, T, width) tensors; everything of each row, (B, S, width), copied together unless it is one run."""
        rows, pages = self.rows, self.pages
        joint = torch.cat(new, -1).flatten(0, 1)
        pages.view(-1, pages.shape[-1]).index_copy_(0, rows.slots, joint.to(pages.dtype))
        found = self._stored()
        if found is None:
            found = pages.view(len(pages), -1).index_select(0, rows.gathered)
            found = found.view(len(rows.tables), -1, pages.shape[-1])[:, : rows.seen]
        return found.split([part.shape[-1] for part in self.memory], -1)

    def where(self) -> Where:
        """The rows' blocks."""
        return self.rows.where

    def grow(self) -> None:
        """Nothing: the rows count their new tokens from the beginning."""

    def _stored(self) -> Tensor | None:
        """The one row with its new tokens as a view (1, S, W), if its blocks lie side by side."""
        rows, pages = self.rows, self.pages
        if rows.run is None:
            return None
        n = -(-rows.seen // rows.size)
        return pages[rows.run : rows.run + n].view(1, -1, pages.shape[-1])[:, : rows.seen]
