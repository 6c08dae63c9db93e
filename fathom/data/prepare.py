"""Sources -> shards. A source's training text is read once, for training and for whatever is held out of it; a split
that the source has itself is read by itself."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fathom.data import sources
from fathom.data.cache import key_of, made_once
from fathom.data.shards import FORMAT, Shards, Writer, is_whole, write_header
from fathom.data.sources import Source, Split
from fathom.data.split import Fractions, split_documents
from fathom.errors import DataError
from fathom.log import log
from fathom.places import cache_folder
from fathom.tokenizer.tokenizer import Tokenizer, batched

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Prepared:
    """One source's split as shards; made: now, and not found in the cache."""

    shards: Shards
    made: bool


def held_out(source: Source, fractions: Fractions) -> dict[Split, float]:
    """What is held out of the source's training text: fractions above 0 of splits that it does not have itself."""
    return {split: share for split, share in fractions.items() if share > 0 and not sources.own_split(source, split)}


def has_split(source: Source, split: Split, fractions: Fractions) -> bool:
    """Whether a source gives text to a split."""
    return sources.own_split(source, split) or split in held_out(source, fractions)


def documents(source: Source, split: Split, fractions: Fractions, offline: bool = False) -> Iterator[tuple[Split, str]]:
    """All text that is read to make a split, each document with the split it belongs to."""
    if split != "train" and sources.own_split(source, split):
        return ((split, text) for text in sources.documents(source, split, offline))
    return split_documents(sources.documents(source, "train", offline), held_out(source, fractions))


def prepare(
    source: Source, split: Split, fractions: Fractions, tokenizer: Tokenizer, offline: bool = False
) -> Prepared:
    """The shards of one split, made unless they are in the cache.

    fractions: of validation and test text, where a source has none of its own. Raises DataError for a source that
    cannot be read or has no text, and for a cache that cannot be written.
    """
    alone = split != "train" and sources.own_split(source, split)
    out = {} if alone else held_out(source, fractions)
    splits: tuple[Split, ...] = (split,) if alone else ("train", *out)
    read = split if alone else "train"
    key = key_of(
        {
            "format": FORMAT,
            "source": sources.identity(source, read, offline),
            "split": read,
            "held_out": out,
            "tokenizer": tokenizer.fingerprint,
        }
    )
    name, made = sources.name(source), False

    def make(folder: Path) -> None:
        nonlocal made
        write(folder, name, splits, documents(source, split, fractions, offline), tokenizer)
        made = True

    place = made_once(cache_folder() / "shards" / f"{_slug(name)}-{key}", is_whole, make)
    return Prepared(Shards(place, split, name), made)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-40:] or "text"


def write(
    folder: Path, name: str, splits: tuple[Split, ...], texts: Iterator[tuple[Split, str]], tok: Tokenizer
) -> None:
    """Encode documents, many at a time and in parallel, into the shards of a folder."""
    progress = _Progress(name)
    with ExitStack() as open_files:
        writers = {split: open_files.enter_context(Writer(folder, split, tok.vocab_size)) for split in splits}
        of: list[Split] = []

        def noted() -> Iterator[str]:
            for split, text in texts:
                of.append(split)
                yield text

        for group in batched(noted()):
            for split, text, ids in zip(of, group, tok.encode_batch(group), strict=True):
                writers[split].add([*ids, tok.eos_id], text)
            of.clear()
            progress.tell(writers)
        for split, writer in writers.items():
            if not writer.totals.documents:
                raise DataError(_empty(name, split, writers))
        write_header(folder, tok.vocab_size, tok.fingerprint, {s: w.close() for s, w in writers.items()})
    progress.end(writers)


def _empty(name: str, split: Split, writers: dict[Split, Writer]) -> str:
    if len(writers) == 1 or not any(writer.totals.documents for writer in writers.values()):
        return f"{name} has no text ({split} split). Give a source with at least one document that is not empty."
    return (
        f"{name} has too little text to give any to {split}. Give more text, a text of its own for {split}, or another "
        "validation_fraction and test_fraction in data."
    )


class _Progress:
    """A line now and then while shards are made, and one at the end."""

    def __init__(self, name: str) -> None:
        self.name, self.start = name, time.monotonic()
        self.last = self.start

    def tell(self, writers: dict[Split, Writer]) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            log.info("tokenizing %s: %s", self.name, self._count(writers))

    def end(self, writers: dict[Split, Writer]) -> None:
        log.info("tokenized %s: %s in %.1f s", self.name, self._count(writers), time.monotonic() - self.start)

    def _count(self, writers: dict[Split, Writer]) -> str:
        totals = [writer.totals for writer in writers.values()]
        return f"{sum(t.documents for t in totals):,} documents, {sum(t.tokens for t in totals):,} tokens"
