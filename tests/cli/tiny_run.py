"""A run that was never trained, as `fathom.load` would open it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_models import tiny_config, tiny_model

from fathom.load import Run
from fathom.recipe import RunConfig
from fathom.tokenizer.train import character

ALPHABET = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ:\n."


def tiny_run(folder: Path, text: Path | None = None, depths: int = 1, window: int = 64) -> Run:
    tokenizer = character(ALPHABET)
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": window}
    config = RunConfig.model_validate(
        {
            "model": tiny_config(depths=depths, attention="mla", **sizes).model_dump(),
            "tokenizer": {"kind": "character"},
            "data": {
                "datasets": [{"kind": "text", "path": str(text or folder / "none.txt"), "documents": "paragraph"}],
                "validation_fraction": 0.3,
            },
            "training": {"output_dir": str(folder), "sequence_length": 16, "batch_size": 2},
        }
    )
    model = tiny_model("mla", "v3", depths, **sizes).eval()
    return Run(folder, 7, config, model, tokenizer, torch.device("cpu"))
