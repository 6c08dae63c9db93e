"""How samples are told: their median with quartiles and extremes, and ratios of two contestants pair by pair.

Machines drift while a bench runs; contestants that take turns drift together. So a ratio is made of neighbours,
x_i / y_i of round i, and then its median is taken; the ratio of two medians would mix what the machine did at different
times.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """median, the middle half (low, high) and the extremes of n samples."""

    median: float
    low: float
    high: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """ValueError: no samples."""
        if not samples:
            raise ValueError("there are no samples to tell the spread of")
        ordered = sorted(samples)
        return cls(
            statistics.median(ordered), percentile(ordered, 25), percentile(ordered, 75),
            ordered[0], ordered[-1], len(ordered),
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def shown(self, form: str = ",.0f") -> str:
        """`156 (151–160)`: the median and the extremes."""
        if self.n == 1:
            return format(self.median, form)
        return f"{self.median:{form}} ({self.least:{form}}–{self.most:{form}})"


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted samples, between neighbours in a straight line; share in percent."""
    place = (len(ordered) - 1) * share / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """x_i / y_i over the rounds that both have."""
    return Spread.of([x / y for x, y in zip(ours, theirs, strict=False)])
