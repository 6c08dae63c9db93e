"""The mixture: right in proportion at every prefix, every item once an epoch, random access."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data.mixture import Mixture, permuted

weights = st.lists(st.floats(0.001, 1000, allow_subnormal=False), min_size=1, max_size=9)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_a_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 2**60), st.integers(0, 2**63 - 1), st.data())
def test_large_permutations_stay_inside_and_apart(size: int, key: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, size - 1), max_size=10, unique=True))
    images = [permuted(place, size, key) for place in places]
    assert len(set(images)) == len(places)
    assert all(0 <= image < size for image in images)


def test_a_permutation_refuses_what_is_outside() -> None:
    for position in (-1, 7):
        with pytest.raises(ValueError, match="outside"):
            permuted(position, 7, 0)


def test_permutations_of_five_are_all_likely() -> None:
    seen = Counter(tuple(permuted(i, 5, key) for i in range(5)) for key in range(3_000))
    assert len(seen) == 120  # 25 each are expected, with a deviation of 5
    assert 5 < min(seen.values()) <= max(seen.values()) < 55


def test_neighbours_do_not_stay_neighbours() -> None:
    order = [permuted(i, 10_007, 3) for i in range(10_007)]
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 10


@settings(deadline=None)
@given(weights, st.integers(0, 400))
def test_proportions_hold_at_every_prefix(shares: list[float], n: int) -> None:
    mixture = Mixture([7] * len(shares), shares, seed=0)
    counts = [0] * len(shares)
    for index in range(n):
        source, drawn = mixture.choose(index)
        assert drawn == counts[source]
        counts[source] += 1
        for number, share in enumerate(shares):
            assert abs(counts[number] - (index + 1) * share / sum(shares)) < 2


def test_proportions_hold_far_out() -> None:
    mixture = Mixture([5, 5, 5], [0.7, 0.2, 0.1], seed=0)
    far = 10**15
    assert Counter(mixture.choose(far + i)[0] for i in range(1000)) == {0: 700, 1: 200, 2: 100}
    source, drawn = mixture.choose(far)
    assert abs(drawn - far * (0.7, 0.2, 0.1)[source]) < 2


def test_every_item_once_an_epoch_and_in_another_order_in_the_next() -> None:
    mixture = Mixture([13, 29], [1.0, 2.0], seed=5)
    draws = [mixture.draw(i) for i in range(400)]
    for source, size in enumerate(mixture.sizes):
        own = [(d.epoch, d.item) for d in draws if d.source == source]
        orders = [[item for e, item in own if e == epoch] for epoch in range(len(own) // size)]
        assert len(orders) >= 3
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert orders[0] != orders[1] != orders[2]


def test_draws_are_pure_and_follow_the_seed() -> None:
    first, second = Mixture([101, 11], [3, 1], seed=1), Mixture([101, 11], [3, 1], seed=1)
    wanted = [5, 1000, 3, 77, 0]
    assert [first.draw(i) for i in wanted] == [second.draw(i) for i in reversed(wanted)][::-1]
    other = Mixture([101, 11], [3, 1], seed=2)
    assert [first.draw(i).item for i in range(50)] != [other.draw(i).item for i in range(50)]


@pytest.mark.parametrize(("sizes", "shares"), [([], []), ([1], [1, 2]), ([0], [1]), ([3], [0])])
def test_nonsense_is_refused(sizes: list[int], shares: list[float]) -> None:
    with pytest.raises(ValueError, match="one of each"):
        Mixture(sizes, shares, seed=0)
