"""Held-out text: a pure function of a document's number, every split gets some, nothing is lost or twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data.sources import Split
from fathom.data.split import cut, documents_needed, split_documents, split_of

shares = st.sampled_from([0.0, 0.001, 0.05, 0.1, 0.25, 0.45])


@settings(deadline=None)
@given(shares, shares, st.integers(0, 3000))
def test_shares_are_right_at_every_prefix(validation: float, test: float, n: int) -> None:
    fractions: dict[Split, float] = {"validation": validation, "test": test}
    found = [split_of(i, fractions) for i in range(n)]
    for split, share in fractions.items():
        assert abs(found.count(split) - n * share) < 4
    assert split_of(0, fractions) == "train" or validation + test >= 0.5


@pytest.mark.parametrize("share", [0.4, 0.05, 0.01, 0.0007])
def test_enough_documents_means_one_for_each(share: float) -> None:
    fractions: dict[Split, float] = {"validation": share, "test": share}
    needed = documents_needed(fractions)
    assert needed <= 3 / share + 3
    assert {split_of(i, fractions) for i in range(needed)} == {"train", "validation", "test"}
    assert len({split_of(i, fractions) for i in range(needed - 1)}) < 3


def test_many_documents_stay_whole_and_in_order() -> None:
    documents = [f"text {i}" for i in range(997)]
    parts = list(split_documents(iter(documents), {"validation": 0.1}))
    assert [text for _, text in parts] == documents
    assert 97 <= sum(split == "validation" for split, _ in parts) <= 102
    more = list(split_documents(iter([*documents, "new"]), {"validation": 0.1}))
    assert more[:-1] == parts  # a document that is added moves no other


def test_the_split_has_no_period_of_the_text() -> None:
    held = [i for i in range(4000) if split_of(i, {"validation": 0.05}) == "validation"]
    for period in range(2, 30):
        for rest in range(period):
            share = sum(i % period == rest for i in held) / len(held)
            assert share == pytest.approx(1 / period, abs=0.06)


@settings(deadline=None)
@given(st.text(max_size=200), shares, shares)
def test_a_cut_document_is_in_parts_whole(text: str, validation: float, test: float) -> None:
    parts = list(cut(text, {"validation": validation, "test": test}))
    together = "".join(part for _, part in parts)
    assert "".join(together.split()) == "".join(text.split())
    assert [split for split, _ in parts] == sorted((s for s, _ in parts), key=["train", "validation", "test"].index)


def test_one_document_is_cut_as_nanogpt_cuts_it() -> None:
    data = "".join(chr(97 + i % 26) for i in range(1_115_394))
    train, validation = (part for _, part in split_documents([data], {"validation": 0.1}))
    assert train == data[: int(len(data) * 0.9)]
    assert validation == data[int(len(data) * 0.9) :]


def test_three_ways_at_exact_places() -> None:
    found = dict(cut("x" * 100, {"validation": 0.05, "test": 0.05}))
    assert {split: len(part) for split, part in found.items()} == {"train": 90, "validation": 5, "test": 5}


def test_nothing_held_out_is_everything_for_training() -> None:
    assert list(split_documents(["a", "b"], {})) == [("train", "a"), ("train", "b")]
    assert list(split_documents([], {"validation": 0.1})) == []
