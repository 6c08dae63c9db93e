"""Mixture: index of a draw -> (source, epoch, item of the source). A pure function of (seed, index).

Sources are the leaves of a Huffman tree over their weights. At a node of weight b with children of weights a and b - a,
of the first n draws round(n a / b) go to the first child: at every prefix, a child of the root has its share to within
half a draw, and every source to within 2. Chance has no part in it.

Each source is read in a new permutation every epoch. A Feistel network over an even number of bits, walked along its
cycle until it lands inside, permutes 0 .. n - 1 without an array (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains").
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fathom.runtime.seed import stream

WORD = (1 << 64) - 1
ROUNDS = 8


def _mixed(x: int) -> int:
    """The finaliser of splitmix64: a bijection of 64 bits (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def permuted(position: int, size: int, key: int) -> int:
    """Where `position` of 0 .. size - 1 goes in the permutation that `key` names."""
    if not 0 <= position < size:
        raise ValueError(f"position {position} is outside 0 .. {size - 1}")
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(ROUNDS):
            secret = _mixed((key + number * 0x9E3779B97F4A7C15) & WORD)
            left, right = right, left ^ (_mixed((secret + right) & WORD) & mask)
        position = left << half | right
        if position < size:
            return position


@dataclass(frozen=True)
class _Node:
    """weight; source at a leaf; otherwise two children."""

    weight: int
    source: int = 0
    children: tuple[_Node, _Node] | None = None


def _tree(weights: Sequence[float]) -> _Node:
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    heap = [(int(weight * scale), number, _Node(int(weight * scale), number)) for number, weight in enumerate(exact)]
    heapq.heapify(heap)
    born = len(heap)
    while len(heap) > 1:
        (_, _, light), (_, _, heavy) = heapq.heappop(heap), heapq.heappop(heap)
        joined = _Node(light.weight + heavy.weight, children=(heavy, light))
        heapq.heappush(heap, (joined.weight, born, joined))
        born += 1
    return heap[0][2]


@dataclass(frozen=True)
class Draw:
    """Item `item` of source `source`, drawn in its pass number `epoch`."""

    source: int
    epoch: int
    item: int


class Mixture:
    """sizes: how many items each source has (at least 1); weights: their shares of the draws, above 0."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if len(sizes) != len(weights) or not sizes or min(sizes) < 1 or min(weights) <= 0:
            raise ValueError(f"sizes {sizes} and weights {weights}: one of each for every source, all above 0")
        self.sizes, self.seed = tuple(sizes), seed
        self._root = _tree(weights)

    def choose(self, index: int) -> tuple[int, int]:
        """The source of draw `index`, and how many earlier draws it had."""
        node = self._root
        while node.children is not None:
            first, second = node.children
            before, after = (_rounded(n * first.weight, node.weight) for n in (index, index + 1))
            node, index = (first, before) if after > before else (second, index - before)
        return node.source, index

    def draw(self, index: int) -> Draw:
        """Draw number `index`, from 0."""
        source, drawn = self.choose(index)
        epoch, position = divmod(drawn, self.sizes[source])
        key = stream(self.seed, "data", "order", source, epoch)
        return Draw(source, epoch, permuted(position, self.sizes[source], key))


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
