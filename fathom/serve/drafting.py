"""Drafts of many rows at once by the MTP depths; the mathematics is that of `generate/speculative`.

A sequence keeps, for each depth k, how many places the depth has read (`ends`, its cache's length) and the hidden
states h^k-1 of the places after them (`held`). Place i is true for depth k when token i + k is known; what was read
with drafts in its place is read again.

With the prefix cache, a depth's entries at the last k places of a shared block may stem from another continuation.
That costs a draft now and then, and never a token: verification does not depend on what was drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.generate.sampling import Turn, choose_batch
from fathom.model.transformer import Transformer
from fathom.serve.paged_cache import Pages
from fathom.serve.scheduler import Sequence as Row

HELD = 512  # a sequence that has gone so many tokens without drafting gives it up


class Drafts:
    """What speculation knows of one sequence, of D depths. ends[k-1], held[k-1] belong to depth k."""

    def __init__(self, depths: int) -> None:
        self.ends = [0] * depths
        self.held: list[list[Tensor]] = [[] for _ in range(depths)]  # of (n, D) each
        self.lost = False

    def reset(self) -> None:
        """Its blocks are gone."""
        self.begin(0)

    def begin(self, place: int) -> None:
        """Everything before a place is in the cache."""
        self.ends = [place] * len(self.ends)
        self.held = [[] for _ in self.ends]

    def see(self, hidden: Tensor) -> None:
        """The trunk's hidden states (n, D) at the next places."""
        self.held[0].append(hidden)
        self.lost = self.lost or sum(len(h) for h in self.held[0]) > HELD


class Drafter:
    """The MTP depths of a model, over the blocks of a cache: layer number of depth k in `pages` is N + k - 1."""

    def __init__(self, model: Transformer, pages: Pages) -> None:
        self.model, self.pages = model, pages
        self.depths, self.first = len(model.mtp), len(model.layers)

    def catch_up(self, rows: Sequence[Row]) -> None:
        """Read everything that known tokens allow, without drafting: after a part of a prompt."""
        for depth in range(1, self.depths + 1):
            ready = [row for row in rows if self._readable(row, depth) > row.drafts.ends[depth - 1]]
            if not ready:
                continue
            ends = [self._readable(row, depth) for row in ready]
            starts = [row.drafts.ends[depth - 1] for row in ready]
            texts = [row.tokens(a + depth, b + depth) for row, a, b in zip(ready, starts, ends, strict=True)]
            hidden = self._look(depth, ready, ends, texts, [None] * len(ready))
            for i, (row, end) in enumerate(zip(ready, ends, strict=True)):
                self._keep(row, depth, hidden[i], end)

    def _readable(self, row: Row, depth: int) -> int:
        """The end of the places that a depth can read truly now."""
        drafts: Drafts = row.drafts
        have = drafts.ends[depth - 1] + sum(len(h) for h in drafts.held[depth - 1])
        return min(have, row.length - depth)

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[list[int]]:
        """Drafts for the tokens after each row's last: counts (at most D) of them."""
        found: list[list[int]] = [[] for _ in rows]
        beyond: dict[int, Tensor] = {}  # what the depth before made of drafts, by row: read in this round and not kept
        for depth in range(1, max(counts) + 1):
            at = [i for i, count in enumerate(counts) if count >= depth]
            some = [rows[i] for i in at]
            seen = [row.length - 1 for row in some]  # everything but the last token has hidden states
            starts = [row.drafts.ends[depth - 1] for row in some]
            texts = [_ahead(row, start + depth, found[i]) for i, row, start in zip(at, some, starts, strict=True)]
            hidden = self._look(depth, some, seen, texts, [beyond.get(i) for i in at])
            lengths = [end - start for end, start in zip(seen, starts, strict=True)]
            last = hidden[torch.arange(len(some)), torch.tensor(lengths) - 1]
            tokens = self._choose(last, some, [found[i] for i in at])
            for j, (i, row) in enumerate(zip(at, some, strict=True)):
                true = min(seen[j], max(starts[j], row.length - depth))
                self._keep(row, depth, hidden[j], true)
                beyond[i] = hidden[j, true - starts[j] : lengths[j]]
                found[i].append(tokens[j])
        return found

    def _choose(self, hidden: Tensor, rows: Sequence[Row], before: Sequence[Sequence[int]]) -> list[int]:
        """hidden (B, D) -> the tokens that the depth would choose, with the chance of their places."""
        turns: list[Turn] = []
        for row, drafts in zip(rows, before, strict=True):
            turn = row.answer.turn
            turns.append(turn._replace(output=[*turn.output, *drafts], params=turn.params.without_logprobs))
        return [choice.token for choice in choose_batch(self.model.logits(hidden), turns)]

    def _look(
        self,
        depth: int,
        rows: Sequence[Row],
        ends: Sequence[int],
        texts: Sequence[Sequence[int]],
        beyond: Sequence[Tensor | None],
    ) -> Tensor:
        """Run a depth over the places from its end up to `ends`; texts: the tokens `depth` ahead; beyond: hidden states
        after those held. (B, T, D)."""
        starts = [row.drafts.ends[depth - 1] for row in rows]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        batch = self.pages.rows([row.blocks for row in rows], starts, counts)
        held = [[*row.drafts.held[depth - 1], *([] if b is None else [b])] for row, b in zip(rows, beyond, strict=True)]
        hidden = torch.stack([_padded(parts, n, batch.new) for parts, n in zip(held, counts, strict=True)])
        (cache,) = self.pages.view([self.first + depth - 1], batch)
        out, _ = self.model.look_ahead(depth, hidden, batch.tokens(texts), batch.places, None, cache, batch.real)
        return out

    def _keep(self, row: Row, depth: int, hidden: Tensor, end: int) -> None:
        """Depth `depth` has truly read up to `end`: forget what it read from, and hand its hidden states on."""
        drafts: Drafts = row.drafts
        count = end - drafts.ends[depth - 1]
        if not count:
            return
        rest = torch.cat(drafts.held[depth - 1])[count:]
        drafts.held[depth - 1] = [rest] if len(rest) else []
        drafts.ends[depth - 1] = end
        if depth < self.depths:
            drafts.held[depth].append(hidden[:count])


def _ahead(row: Row, place: int, drafts: Sequence[int]) -> list[int]:
    """The tokens from a place on: those known, and drafts after them."""
    return [*row.tokens(place, row.length), *drafts[max(0, place - row.length) :]]


def _padded(parts: Sequence[Tensor], count: int, length: int) -> Tensor:
    """The first `count` of some hidden states, (length, D), zeros after them."""
    joint = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
    joint = joint[:count]
    return joint if count == length else torch.nn.functional.pad(joint, (0, 0, 0, length - count))
