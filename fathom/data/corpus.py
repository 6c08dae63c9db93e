"""The door of the room: `open_data(config, tokenizer, "train").train_loader(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.batch import Batch
from fathom.data import prepare
from fathom.data.cache import key_of
from fathom.data.evaluation import evaluation_batches
from fathom.data.loader import DataConfig, TrainLoader
from fathom.data.packing import Dynamic, Packed, packing
from fathom.data.shards import Shards, Totals
from fathom.data.sources import Split
from fathom.errors import DataError
from fathom.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """The shards of one split, all sources, and how they are mixed and packed.

    shards, weights   one of each for every source that has the split
    batching          how documents become rows
    prefetch          batches that a training loader makes ahead
    """

    shards: tuple[Shards, ...]
    weights: tuple[float, ...]
    batching: Packed | Dynamic
    prefetch: int = 2

    @property
    def totals(self) -> Totals:
        """Documents, tokens, bytes and words of all sources."""
        return sum((source.totals for source in self.shards), Totals())

    @property
    def documents(self) -> int:
        """How many texts."""
        return self.totals.documents

    @property
    def tokens(self) -> int:
        """How many tokens, the end of each document included."""
        return self.totals.tokens

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the texts."""
        return self.totals.bytes

    @property
    def words(self) -> int:
        """Words of the texts: what white space separates."""
        return self.totals.words

    @property
    def fingerprint(self) -> str:
        """Stands for the tokens, their mixture and their packing."""
        said = [source.fingerprint for source in self.shards], self.weights, self.batching.model_dump(mode="json")
        return key_of(said)

    def beginning(self, tokens: int) -> Tensor:
        """At most so many of the first tokens of all sources, one after the other: (N) int64."""
        parts = []
        for source in self.shards:
            taken = min(tokens, source.totals.tokens)
            parts.append(torch.from_numpy(source.read(0, taken)))
            tokens -= taken
        return torch.cat(parts)

    def train_loader(
        self, batch_size: int, sequence_length: int, seed: int, rank: int = 0, world: int = 1
    ) -> TrainLoader:
        """Endless micro-batches of batch_size rows over all ranks; the order is a pure function of (seed, index).

        DataError: a source shorter than a row, or more ranks than rows.
        """
        if world > batch_size:
            raise DataError(
                f"training.batch_size is {batch_size} rows over all ranks, and there are {world} ranks; "
                "raise it, so that every rank has a row."
            )
        order = {"seed": seed, "batch_size": batch_size, "sequence_length": sequence_length, "data": self.fingerprint}
        made = packing(self.batching, self.shards, self.weights, batch_size, sequence_length, seed)
        return TrainLoader(made, order, rank=rank, world=world, prefetch=self.prefetch)

    def evaluation_batches(
        self, batch_size: int, sequence_length: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Every target once, in document order; see `evaluation.evaluation_batches`."""
        apart = isinstance(self.batching, Dynamic) or self.batching.keep_documents_apart
        return evaluation_batches(self.shards, batch_size, sequence_length, limit, rank, world, apart)


def has_split(config: DataConfig, split: Split) -> bool:
    """Whether any source gives text to a split."""
    return any(prepare.has_split(source, split, config.fractions) for source in config.datasets)


def open_data(config: DataConfig, tokenizer: Tokenizer, split: Split) -> Corpus:
    """The corpus of a split; its shards are made unless they are in the cache.

    DataError: a source that is missing, unreadable or empty, or a split to which no source gives text.
    """
    if not has_split(config, split):
        raise DataError(
            f"No source has {split} text. Set data.{split}_fraction above 0, or give a source its own ({split}_split, "
            f"{split}_path)."
        )
    chosen = [source for source in config.datasets if prepare.has_split(source, split, config.fractions)]
    made = [prepare.prepare(source, split, config.fractions, tokenizer, config.offline) for source in chosen]
    return Corpus(
        tuple(one.shards for one in made), tuple(source.weight for source in chosen), config.batching, config.prefetch
    )


def training_texts(config: DataConfig) -> Iterator[str]:
    """The training text of all sources, for tokenizers that learn from it; held-out text is not in it."""
    for source in config.datasets:
        for split, text in prepare.documents(source, "train", config.fractions, config.offline):
            if split == "train":
                yield text
