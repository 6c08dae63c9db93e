"""Fathom's data path, piece by piece: texts -> tokens, texts -> shards, shards -> batches."""

from __future__ import annotations

import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from fathom.data.corpus import open_data
from fathom.data.loader import DataConfig
from fathom.data.prepare import write
from fathom.data.shards import Shards
from fathom.data.sources import Embedded, documents
from fathom.load import TOKENIZER
from fathom.tokenizer.tokenizer import Tokenizer, batched

PACKAGES = ("fathom-lm",)


class Feeder:
    """job: {model (a run folder), texts (how many of the embedded ones), share (of them, in the loader), batch_size,
    sequence_length, batches, cache}."""

    def __init__(self, job: dict[str, Any]) -> None:
        os.environ["FATHOM_CACHE"] = job["cache"]
        self.job = job
        self.tokenizer = Tokenizer.load(Path(job["model"]) / TOKENIZER)
        self.texts = list(islice(documents(Embedded(kind="embedded"), "train"), job["texts"]))
        self.setting = {"texts": len(self.texts), "cores": os.cpu_count()}
        config = DataConfig(datasets=(Embedded(kind="embedded", split_ratio=job["share"]),), validation_fraction=0.0)
        corpus = open_data(config, self.tokenizer, "train")
        self.loader = corpus.train_loader(job["batch_size"], job["sequence_length"], seed=0)

    def encode(self) -> dict[str, float]:
        """Texts to ids, many at a time as shards are made."""
        start, tokens = time.perf_counter(), 0
        for group in batched(self.texts):
            tokens += sum(map(len, self.tokenizer.encode_batch(group)))
        return self._told(start, tokens, self.texts)

    def shards(self) -> dict[str, float]:
        """Texts to token shards on the disk, counts of bytes and words included."""
        with tempfile.TemporaryDirectory(dir=self.job["cache"]) as folder:
            start = time.perf_counter()
            write(Path(folder), "bench", ("train",), (("train", text) for text in self.texts), self.tokenizer)
            return self._told(start, Shards(Path(folder), "train", "bench").totals.tokens, self.texts)

    def batches(self) -> dict[str, float]:
        """Shards to batches, as training takes them."""
        start, tokens = time.perf_counter(), 0
        for batch in islice(self.loader, self.job["batches"]):
            tokens += batch.tokens.numel()
        told = self._told(start, tokens, ())
        self.loader.close()  # the next turn begins with nothing made ahead
        return told

    def _told(self, start: float, tokens: int, texts: Any) -> dict[str, float]:
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens, "bytes": sum(len(text.encode()) for text in texts)}
