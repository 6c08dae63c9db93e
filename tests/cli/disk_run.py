"""A run on disk that was never trained: what `fathom export`, `import` and `verify` open."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_models import tiny_config, tiny_model

from fathom.config.text import dump
from fathom.hub.names import names_of
from fathom.model.transformer import Transformer
from fathom.recipe import RunConfig
from fathom.tokenizer.train import byte
from fathom.train.checkpoint import RunFolder
from fathom.train.state import TrainState

TEXT = "The people of the United States, in order to form a more perfect union.\n"


def disk_run(path: Path, depths: int = 1, attention: str = "mla_low_rank", moe: str = "v3") -> Transformer:
    """Write the run; its model."""
    sizes = {"vocab_size": 262, "max_position_embeddings": 64}
    model = tiny_model(attention, moe, depths, **sizes).eval()
    for layer in model.moe_layers().values():
        layer.gate.e_score_correction_bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(layer.layer))
    config = RunConfig.model_validate(
        {
            "model": tiny_config(attention, moe, depths, **sizes).model_dump(),
            "tokenizer": {"kind": "byte"},
            "data": {"datasets": [{"kind": "embedded"}]},
            "training": {"output_dir": str(path), "sequence_length": 32},
        }
    )
    folder = RunFolder.create(path)
    folder.write("config.yaml", dump(config))
    byte().save(path / "tokenizer")
    state = TrainState(step=7).to_dict()
    folder.save(7, model.state_dict(), {}, {}, {"state": state}, names_of(model.config))
    return model
