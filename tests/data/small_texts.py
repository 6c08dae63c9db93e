"""Small sources and corpora that the tests of data/ share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fathom.data.corpus import Corpus, open_data
from fathom.data.loader import DataConfig
from fathom.data.sources import Split
from fathom.tokenizer.train import byte

WORDS = ["one", "two", "three", "é", "seven and a half", "zoë 🤖", "the last of the words"]


def text(number: int) -> str:
    """Document `number`: no two are alike, and their lengths differ."""
    return " ".join(
        [f"document {number}:", *(f"{WORDS[(number * 3 + k) % len(WORDS)]} {number}" for k in range(number % 11))]
    )


def jsonl(path: Path, documents: list[str]) -> Path:
    """A .jsonl file of documents."""
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    return path


def corpus(folder: Path, split: Split = "train", counts: tuple[int, ...] = (53,), **data: Any) -> Corpus:
    """A corpus of byte tokens; source k has counts[k] documents."""
    sources = []
    for number, count in enumerate(counts):
        path = jsonl(folder / f"{number}.jsonl", [text(1000 * number + k) for k in range(count)])
        sources.append({"kind": "jsonl", "path": str(path), "weight": float(number + 1)})
    config = DataConfig.model_validate({"datasets": sources, "validation_fraction": 0.1, **data})
    return open_data(config, byte(), split)
