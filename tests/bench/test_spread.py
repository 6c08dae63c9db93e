"""Medians, quartiles, and ratios pair by pair."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.bench.spread import Spread, percentile, ratios

numbers = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=30)


@given(numbers)
def test_spread_is_ordered(samples: list[float]) -> None:
    told = Spread.of(samples)
    assert told.least <= told.low <= told.median <= told.high <= told.most
    assert told.median == statistics.median(samples)
    assert (told.least, told.most, told.n) == (min(samples), max(samples), len(samples))


def test_percentiles_lie_on_a_straight_line() -> None:
    assert [percentile([1.0, 2.0, 4.0], share) for share in (0, 25, 50, 75, 100)] == [1, 1.5, 2, 3, 4]
    assert percentile([7.0], 99) == 7


def test_ratios_are_of_neighbours() -> None:
    """A machine that becomes ten times slower half way changes no ratio; the ratio of medians would be another."""
    ours, theirs = [100.0, 10.0, 10.0], [50.0, 50.0, 5.0]
    assert ratios(ours, theirs).median == 2.0
    assert statistics.median(ours) / statistics.median(theirs) == 0.2


def test_words() -> None:
    assert Spread.of([3.0]).shown() == "3"
    assert Spread.of([1234.0, 1200.0, 1300.0]).shown() == "1,234 (1,200–1,300)"
    assert Spread.of([0.5, 0.25]).shown(".2f") == "0.38 (0.25–0.50)"
    assert Spread(**Spread.of([1.0, 2.0]).facts()) == Spread.of([1.0, 2.0])
    with pytest.raises(ValueError, match="no samples"):
        Spread.of([])
