"""Who computes what in the next step. Knows tokens and blocks, no tensors.                    Yu et al. 2022 (Orca)

A step reads at most `max_num_batched_tokens` tokens. Those who are under way come first, one new token each (and
drafts); the rest of the budget goes to prompts, in chunks, first come first served. When blocks run out, whoever
came last gives theirs back and waits in front; what it has said so far is then read again as part of its prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fathom.generate.answer import Answer
from fathom.serve.blocks import Blocks, Node

PLAIN, DRAFTING = -1, -2  # roots: blocks of sequences that draft hold MTP's entries too


@dataclass(eq=False)
class Sequence:
    """A request under way.

    computed   places whose cache entries are there: the first so many of `tokens`
    blocks     of the cache, in order of the text; known: how many are remembered, up to the path `node`
    cached     tokens of the prompt that came from the prefix cache
    drafts     what speculation knows of it; None: it does not draft
    """

    ticket: int
    answer: Answer
    arrived: float
    deadline: float | None = None
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    known: int = 0
    node: Node = PLAIN
    cached: int | None = None
    started: float | None = None
    spoke: float | None = None  # when its first token came
    drafts: Any = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.answer.turn.prompt) + len(self.answer.turn.output)

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens of prompt and answer at places start to end - 1."""
        prompt, output = self.answer.turn.prompt, self.answer.turn.output
        edge = len(prompt)
        return [*prompt[start:end], *output[max(0, start - edge) : max(0, end - edge)]]

    @property
    def decoding(self) -> bool:
        """Whether it speaks, and only its last token is still to be read."""
        return self.computed == self.length - 1 and bool(self.answer.turn.output)


@dataclass(frozen=True)
class Share:
    """A sequence's part of a step: `count` tokens from `start` on, and room for so many drafts after them. decoding: it
    reads its own last token, not a text that was given."""

    sequence: Sequence
    start: int
    count: int
    drafts: int = 0
    decoding: bool = False

    @property
    def reaches_end(self) -> bool:
        """Whether a token can be chosen after it."""
        return self.start + self.count == self.sequence.length


class Scheduler:
    """Queues and blocks. drafts(sequence): how many drafts a decoding sequence may have in the next step."""

    def __init__(
        self, blocks: Blocks, max_num_seqs: int, max_num_batched_tokens: int, drafts: Callable[[Sequence], int]
    ) -> None:
        self.blocks, self.max_num_seqs, self.max_num_batched_tokens = blocks, max_num_seqs, max_num_batched_tokens
        self.drafts = drafts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = self.prefix_queries = self.prefix_hits = 0

    def add(self, sequence: Sequence) -> None:
        """To the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended; its blocks are free."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Share]:
        """The shares of the next step; blocks for them are taken."""
        budget, shares, before = self.max_num_batched_tokens, list[Share](), self.preemptions
        for sequence in list(self.running):
            if budget < 1:
                break
            if sequence not in self.running:  # it gave its blocks to one before it
                continue
            share = self._share(sequence, budget, self.drafts(sequence) if sequence.decoding else 0)
            if self._make_room(share):
                shares.append(share)
                budget -= share.count + share.drafts
        while budget > 0 and self.waiting and len(self.running) < self.max_num_seqs and before == self.preemptions:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.running.append(self.waiting.popleft())
            share = self._share(sequence, budget, 0)
            shares.append(share)
            budget -= share.count
        return shares

    def commit(self, sequence: Sequence, computed: int) -> None:
        """Its first `computed` places are in the cache; full blocks are remembered."""
        sequence.computed, size = computed, self.blocks.size
        while (sequence.known + 1) * size <= computed:
            start = sequence.known * size
            tokens = sequence.tokens(start, start + size)
            sequence.node = self.blocks.remember(sequence.blocks[sequence.known], tokens, sequence.node)
            sequence.known += 1

    @staticmethod
    def _share(sequence: Sequence, budget: int, drafts: int) -> Share:
        count = min(sequence.length - sequence.computed, budget)
        return Share(sequence, sequence.computed, count, min(drafts, budget - count), sequence.decoding)

    def _make_room(self, share: Share) -> bool:
        """Take the blocks that a running sequence's share needs, from those who came after it if it must be; false: it
        had to give its own back."""
        sequence = share.sequence
        lacking = self.blocks.needed(share.start + share.count + share.drafts) - len(sequence.blocks)
        while lacking > 0:
            fresh = self.blocks.take(lacking)
            if fresh is not None:
                sequence.blocks += fresh
                break
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.known = [], 0, 0
        if sequence.drafts is not None:
            sequence.drafts.reset()

    def _admit(self, sequence: Sequence) -> bool:
        """Find what is known of its text and take blocks for the rest; false if there are not enough now."""
        root = PLAIN if sequence.drafts is None else DRAFTING
        scored = (
            sequence.answer.request.params.prompt_logprobs is not None and sequence.answer.left == sequence.answer.room
        )
        found, node = ([], root) if scored else self.blocks.match(sequence.tokens(0, sequence.length), root)
        fresh = self.blocks.take(self.blocks.needed(sequence.length + 1) - len(found))
        if fresh is None:
            self.blocks.release(found)
            return False
        sequence.blocks, sequence.known, sequence.node = found + fresh, len(found), node
        sequence.computed = len(found) * self.blocks.size
        if sequence.drafts is not None:
            sequence.drafts.begin(sequence.computed)
        if sequence.cached is None:
            sequence.cached = sequence.computed
            self.prefix_queries += sequence.length
            self.prefix_hits += sequence.computed
        return True
