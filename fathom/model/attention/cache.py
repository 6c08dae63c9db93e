"""What attention asks of a cache, and the masks that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fathom.model.native.layers import Where


class LayerCache(Protocol):
    """The memory of one attention layer. Each attention says by `cache_widths` which tensors it keeps and how wide
    they are: MLA a latent (C) and a rotary key (R), GQA keys and values (N_kv * H each)."""

    def places(self, new: int, device: torch.device) -> Tensor:
        """Where the next `new` = T tokens of each row stand: (B or 1, T) int64, counted from the row's beginning."""

    def visible(self, new: int, device: torch.device) -> Visibility:
        """What the next T tokens of each row may look at, in what `append` will return."""

    def before(self, tokens: Tensor, count: int) -> Tensor:
        """Take note of the next tokens (B, T); the `count` tokens before them (B, count), -1 where there were none.
        Only the first layer's cache is asked, and only by a model with an n-gram memory."""

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """Where tokens are kept, (blocks, size, width) each. `where` says which token is where."""

    def where(self) -> Where | None:
        """Everything stored and a place for one more token of each row; None if a caller cannot be told. Only the first
        layer's cache is asked."""

    def grow(self) -> None:
        """Count one more token of each row as stored: the caller has written it to its place."""

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store new (B, T, width) tensors; return everything stored, (B, S, width) each. Rows may have different
        lengths: what lies beyond a row's own is anything, and `visible` hides it."""


@dataclass(frozen=True)
class Visibility:
    """Which of S seen tokens each of T new ones may look at, worked out once a forward pass and shared by all layers.

    mask    None, or bool (B or 1, 1, T, S), true where a token may look
    causal  with mask None: the plain triangle (T == S); with neither: everything (one new token)
    """

    mask: Tensor | None
    causal: bool

    @classmethod
    def of(cls, new: int, seen: int, segments: Tensor | None, device: torch.device) -> Visibility:
        """The smallest description for `new` = T tokens after `seen` - T cached ones, documents (B, T) kept apart."""
        if segments is not None:
            triangle = torch.ones(new, new, dtype=torch.bool, device=device).tril()
            same = segments[:, None, :, None] == segments[:, None, None, :]
            return cls(same & triangle, causal=False)
        if new == seen:
            return cls(None, causal=new > 1)
        if new == 1:
            return cls(None, causal=False)
        triangle = torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)
        return cls(triangle[None, None], causal=False)

    def bias(self, new: int, seen: int, device: torch.device) -> Tensor | None:
        """The same as a float32 term to add to scores (B or 1, 1, T, S): 0 where a token may look, else -inf."""
        if self.mask is not None:
            return self._masked
        if not self.causal:
            return None
        return _term(torch.ones(new, seen, dtype=torch.bool, device=device).tril()[None, None])

    @cached_property
    def _masked(self) -> Tensor:
        """The mask as a term, made once for all layers."""
        assert self.mask is not None
        return _term(self.mask)


def _term(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
