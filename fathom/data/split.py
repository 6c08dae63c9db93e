"""Held-out text, where a source has none of its own: a pure function of a document's number and the wanted fractions.

    u_i = fraction of (1/2 + i / golden ratio)      document i is held out where u_i < validation + test

The golden rotation spreads evenly, at no period that a text could share, and needs no count: the first n documents hold
the wanted shares to within a few documents, whatever n is. A source with so few documents that a split would get none
(one long file, most often) has each of its documents cut by characters instead: first training, then validation, then
test. With fraction 0.1 a text of n characters is cut at int(0.9 n), as nanoGPT cuts tiny Shakespeare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, count, islice

from fathom.data.sources import Split

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: integers are exact at any document number
TURN = 1 << 64

Fractions = Mapping[Split, float]


def split_of(index: int, fractions: Fractions) -> Split:
    """The split that document `index` belongs to; fractions: of validation and test, where they are wanted."""
    u = ((TURN // 2 + index * GOLDEN) % TURN) / TURN
    for split, share in fractions.items():
        if u < share:
            return split
        u -= share
    return "train"


def documents_needed(fractions: Fractions) -> int:
    """How many documents a source must have for each split to get one."""
    missing: set[Split] = {"train", *(split for split, share in fractions.items() if share > 0)}
    for index in count():
        missing.discard(split_of(index, fractions))
        if not missing:
            return index + 1
    raise AssertionError("count() ends")


def cut(text: str, fractions: Fractions) -> Iterator[tuple[Split, str]]:
    """One document in parts, by characters: the first is for training. Parts without text are left out."""
    share = round(1 - sum(fractions.values()), 12)
    start, end = 0, int(share * len(text))
    parts: list[tuple[Split, str]] = [("train", text[:end])]
    for split, fraction in fractions.items():
        share = round(share + fraction, 12)
        start, end = end, int(share * len(text))
        parts.append((split, text[start:end]))
    yield from ((split, part) for split, part in parts if part and not part.isspace())


def split_documents(documents: Iterable[str], fractions: Fractions) -> Iterator[tuple[Split, str]]:
    """Each document, or part of one, with the split it belongs to; in one pass, and in order."""
    rest = iter(documents)
    needed = documents_needed(fractions) if fractions else 0
    first = list(islice(rest, needed))
    if len(first) < needed:
        for text in first:
            yield from cut(text, fractions)
        return
    for index, text in enumerate(chain(first, rest)):
        yield split_of(index, fractions), text
