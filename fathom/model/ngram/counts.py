"""What follows what in a text: counts of all n-grams, and the Kneser-Ney distributions that follow from them.

                        Kneser and Ney 1995; Chen and Goodman 1998 (TR-10-98), sections 3 and 4.1.6

    p_k(v) = max(0, c_k(v) - D(c_k(v))) / c_k  +  lambda_k p_{k-1}(v),   lambda_k = sum_v min(c_k(v), D(c_k(v))) / c_k

after the last k tokens; c_k = sum_v c_k(v). For the longest context c_k(v) says how often v came after it, for shorter
ones after how many different tokens before it. p_{-1} is uniform, and a context that never came says p_{k-1}.

A model that is trained on the text that was counted would learn to trust a memory of the very tokens it has to
foretell. So the text is cut into blocks, each of which is counted apart as well, and what a block has added to the
counts is taken away again for its own tokens (`Left`).

Letters  B rows  T tokens  V vocabulary  K lengths of context: 0 .. K - 1 tokens  n = B T places
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DISCOUNTS = (0.7, 0.9, 1.1)  # D of what was seen once, twice, and more often
NOWHERE = -1  # the number of a context that never came


class Level(NamedTuple):
    """All contexts of one length that came in a text, numbered 0 .. C - 1, and the P pairs of one and its follower.

    keys      (C)      sorted: number of the context without its oldest token x V + that token; at length 0 the root
    starts    (C + 1)  where the pairs of each begin
    follower  (P)      token
    times     (P)      float32: how often the pair came
    kinds     (P)      float32: after how many different tokens it came (of a block: those that no other block has)
    """

    keys: Tensor
    starts: Tensor
    follower: Tensor
    times: Tensor
    kinds: Tensor


Levels = tuple[Level, ...]


class Left(NamedTuple):
    """What is left out of the counts: levels of blocks apart, whose roots are blocks, and the block of each place
    (B, T), -1 where nothing is."""

    levels: Levels
    block: Tensor


def count(text: Tensor, vocabulary: int, lengths: int, block: Tensor | None = None) -> tuple[Levels, Levels]:
    """text (N) int64 -> levels of the whole and, with the block (N) of every token, of the blocks apart."""
    whole = _Counting(text, vocabulary, torch.zeros_like(text))
    parts = None if block is None else _Counting(text, vocabulary, block)
    for length in range(lengths + 1):  # one more, which tells the kinds of the one before
        new = whole.step(length)
        whole.tell_kinds(torch.ones_like(new.first, dtype=torch.bool), new)
        if parts is not None:
            own = parts.step(length)
            alone = own.times == new.times[new.pair_of[own.first]]
            parts.tell_kinds(alone, own)
    return tuple(whole.levels[:lengths]), tuple(parts.levels[:lengths]) if parts else ()


class _Pairs(NamedTuple):
    """Of one length: the number of every place's pair (N), and of each pair a place and how often it came."""

    pair_of: Tensor
    first: Tensor
    times: Tensor


class _Counting:
    """Level after level of one text; roots (N): what each token's shortest context is."""

    def __init__(self, text: Tensor, vocabulary: int, roots: Tensor) -> None:
        self.text, self.vocabulary, self.context = text, vocabulary, roots
        self.levels: list[Level] = []
        self._before: Tensor | None = None

    def step(self, length: int) -> _Pairs:
        """Count the contexts of this length; the first `length` tokens have none."""
        text, size, n = self.text, self.vocabulary, self.text.numel()
        if length:
            keys, inverse = torch.unique(self.context[length:] * size + text[: n - length], return_inverse=True)
            self.context = torch.cat((inverse.new_zeros(length), inverse))
        else:
            keys = torch.arange(int(self.context.max()) + 1)
        pairs, inverse, times = torch.unique(
            self.context[length:] * size + text[length:], return_inverse=True, return_counts=True
        )
        starts = torch.searchsorted(pairs, torch.arange(len(keys) + 1) * size)
        first = torch.empty_like(pairs).scatter_(0, inverse, torch.arange(length, n))
        self.levels.append(Level(keys, starts, pairs % size, times.float(), times.float()))
        return _Pairs(torch.cat((inverse.new_zeros(length), inverse)), first, times)

    def tell_kinds(self, counted: Tensor, new: _Pairs) -> None:
        """Each pair of the level before came after so many tokens as it has counted pairs of this level above it."""
        if self._before is not None:
            shorter = self.levels[-2]
            kinds = torch.bincount(self._before[new.first[counted]], minlength=shorter.times.numel())
            self.levels[-2] = shorter._replace(kinds=kinds.float())
        self._before = new.pair_of


def contexts(levels: Levels, tokens: Tensor, vocabulary: int, known: Tensor, root: Tensor | None = None) -> Tensor:
    """The contexts after each token (B, T): numbers (K, B, T), NOWHERE for those that never came. known (B, T): how
    many tokens up to this one are its past. root (B, T): where to begin; None: the one root."""
    found = torch.full((len(levels), *tokens.shape), NOWHERE, device=tokens.device)
    found[0] = 0 if root is None else root
    for k in range(1, min(len(levels), tokens.shape[1] + 1)):
        shorter, keys = found[k - 1][:, k - 1 :], levels[k].keys
        wanted = shorter * vocabulary + tokens[:, : tokens.shape[1] - k + 1]
        at = torch.searchsorted(keys, wanted).clamp_(max=max(0, len(keys) - 1))
        there = (shorter >= 0) & (known[:, k - 1 :] >= k)
        there = there & (keys[at] == wanted) if len(keys) else there & False
        found[k][:, k - 1 :] = torch.where(there, at, NOWHERE)
    return found


def counts_of(level: Level, context: Tensor, vocabulary: int, longest: bool) -> Tensor:
    """context (n) -> c (n, V) float32: 0 for NOWHERE."""
    counts = torch.zeros(context.numel() * vocabulary, device=context.device)
    _add(counts, level, context, vocabulary, longest, 1.0)
    return counts.view(-1, vocabulary)


def _add(counts: Tensor, level: Level, context: Tensor, vocabulary: int, longest: bool, sign: float) -> None:
    safe = context.clamp(min=0)
    begin = level.starts[safe]
    size = (level.starts[safe + 1] - begin) * (context >= 0)
    row = torch.repeat_interleave(size)
    pair = torch.arange(row.numel(), device=row.device) + (begin - size.cumsum(0) + size)[row]
    at, what = row * vocabulary + level.follower[pair], level.times if longest else level.kinds
    counts[at] = counts[at] + sign * what[pair]  # no place is named twice


class Recalled(NamedTuple):
    """log_p (n, K, V): what is likely after the last 0 .. K - 1 tokens; trust (n, 2 K): log(1 + c_k) and lambda_k."""

    log_p: Tensor
    trust: Tensor


def nothing(places: int, vocabulary: int, lengths: int, device: torch.device) -> Recalled:
    """What counts of no text say of n places."""
    log_p = torch.full((places, lengths, vocabulary), -math.log(vocabulary), device=device)
    return Recalled(log_p, torch.tensor([0.0, 1.0], device=device).repeat_interleave(lengths).expand(places, -1))


def recall(levels: Levels, tokens: Tensor, vocabulary: int, known: Tensor, skip: int, left: Left | None) -> Recalled:
    """What the counts say after each token (B, skip + T) but the first `skip`: float32."""
    places = contexts(levels, tokens, vocabulary, known)[..., skip:].flatten(1)
    own = None
    if left is not None:
        own = contexts(left.levels, tokens, vocabulary, known, left.block)[..., skip:].flatten(1)
    once, twice, more = DISCOUNTS
    p = torch.full((places.shape[1], vocabulary), 1 / vocabulary, device=tokens.device)
    logs, totals, lambdas = [], [], []
    for k, level in enumerate(levels):
        longest = k == len(levels) - 1
        c = counts_of(level, places[k], vocabulary, longest)
        if left is not None and own is not None:
            _add(c.view(-1), left.levels[k], own[k], vocabulary, longest, -1.0)
        discount = c.clamp(max=1) * once + (c - 1).clamp_(0, 1) * (twice - once) + (c - 2).clamp_(0, 1) * (more - twice)
        total = c.sum(1, keepdim=True)
        share = torch.where(total > 0, discount.sum(1, keepdim=True) / total.clamp(min=1), 1.0)
        p = torch.addcmul(c.sub_(discount).div_(total.clamp(min=1)), p, share)
        logs.append(p.log())
        totals.append(total.log1p())
        lambdas.append(share)
    return Recalled(torch.stack(logs, 1), torch.cat((*totals, *lambdas), 1))
