"""Blocks of the cache: who holds which, and which can be used again. Counts only; the numbers are in `paged_cache`.

Text that was read before need not be read again: a full block is known by its tokens and the block before it, a chain
of which is a path in a tree, so that equal paths mean equal text and no hash can collide. A block that nobody holds
stays known until its room is needed; the one released longest ago goes first, and a sequence releases its last block
first, so that what ends a path goes before what begins it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

Node = int  # a path in the tree; roots are negative


class Blocks:
    """count blocks of `size` tokens each, numbered from 0. reuse: remember full ones."""

    def __init__(self, count: int, size: int, reuse: bool = True) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"{count} blocks of {size} tokens hold nothing")
        self.count, self.size, self.reuse = count, size, reuse
        self._holders = [0] * count
        self._empty = deque(range(count))  # held by nobody, and nothing is known of them
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody but known, longest released first
        self._known: dict[tuple[Node, tuple[int, ...]], tuple[Node, int]] = {}  # path before, tokens -> path, block
        self._key: dict[int, tuple[Node, tuple[int, ...]]] = {}  # block -> its key in _known
        self._nodes = 0

    @property
    def free(self) -> int:
        """How many can be taken."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """How many are held."""
        return self.count - self.free

    def needed(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """Hold so many blocks with nothing in them; None, and nothing changes, if there are not enough."""
        if count > self.free:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._empty:
            block = self._empty.popleft()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._key.pop(block)]
        self._holders[block] = 1
        return block

    def match(self, tokens: Sequence[int], root: Node = -1) -> tuple[list[int], Node]:
        """The blocks that hold the beginning of a text, as far as it is known, held once more; and their path. At least
        one token is left over, since what follows the last must be computed."""
        found, node = list[int](), root
        if self.reuse:
            for start in range(0, len(tokens) - self.size, self.size):
                entry = self._known.get((node, tuple(tokens[start : start + self.size])))
                if entry is None:
                    break
                node, block = entry
                if not self._holders[block]:
                    del self._idle[block]
                self._holders[block] += 1
                found.append(block)
        return found, node

    def remember(self, block: int, tokens: Sequence[int], node: Node) -> Node:
        """A held block is full of these tokens, after the path `node`; the path that ends with it. If the same text is
        known from another block, that one stays."""
        if not self.reuse:
            return node
        key = (node, tuple(tokens))
        entry = self._known.get(key)
        if entry is None and block not in self._key:
            self._nodes += 1
            entry = self._known[key] = (self._nodes, block)
            self._key[block] = key
        return node if entry is None else entry[0]

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence lets go of its blocks, given in order of its text."""
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is released and nobody holds it")
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._key:
                    self._idle[block] = None
                else:
                    self._empty.append(block)
