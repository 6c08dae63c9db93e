"""The door that opens a run: a path -> model, tokenizer, configuration.

    RUN         a run folder: its newest whole checkpoint
    RUN@best    the checkpoint with the lowest validation loss
    RUN@500     the checkpoint of step 500
    FOLDER      a Hugging Face folder: what `fathom export` wrote, or a released model

Only YAML, JSON and safetensors are read: nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fathom.errors import CheckpointError, ConfigError
from fathom.generate.generator import Generator
from fathom.generate.request import SamplingParams
from fathom.hub.family import Weights
from fathom.hub.huggingface import Pretrained, pretrained, weights_of
from fathom.hub.names import names_of
from fathom.hub.shards import Shards
from fathom.log import log
from fathom.model.transformer import ModelConfig, Transformer
from fathom.recipe import RunConfig, load_config
from fathom.runtime.device import DTYPES, canonical
from fathom.tokenizer.ids import is_of_ids, of_ids
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.train.checkpoint import Checkpoint, RunFolder

TOKENIZER = "tokenizer"  # folder of a run with its tokenizer.json


@dataclass(frozen=True)
class Run:
    """A model with what belongs to it.

    path, step   the run folder, and the step whose weights these are; 0 for a Hugging Face folder
    config       the resolved configuration
    model        in eval mode; `run.model(tokens)`: (B, T) int64 -> logits (B, T, V)
    metrics      of the last evaluation, as far as it is known
    signal       the number of the signal that ended a training before its last step, or None
    """

    path: Path
    step: int
    config: RunConfig
    model: Transformer
    tokenizer: Tokenizer
    device: torch.device
    metrics: dict[str, Any] = field(default_factory=dict)
    signal: int | None = None

    def generate(self, prompt: str, **sampling: Any) -> str:
        """The continuation of a prompt. sampling: the fields of `generate.request.SamplingParams` (max_tokens,
        temperature, top_p, top_k, seed, stop, ...). RequestError: an unknown or impossible option, or no room."""
        generator = Generator(self.model, self.tokenizer)
        return generator.complete(generator.request(prompt, SamplingParams.of(sampling))).text


def load(path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32") -> Run:
    """Open a run for use, or a Hugging Face folder.

    CheckpointError: no run there, no whole checkpoint, another format. ConfigError: a device or dtype that is not here,
    or a Hugging Face model that ours is not.
    """
    where, kind = _device(device), _dtype(dtype)
    if is_exported(path):
        found = pretrained(path)
        config, tokenizer = recipe_for(found, Path(path), Path(path)), words_of(found)
        return Run(Path(path), 0, config, found.model(kind, where), tokenizer, where)
    folder, checkpoint = find(path)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder)
    model = empty_model(config.model)
    checkpoint.load_model(model, names_of(config.model))
    if model.memory is not None:
        model.memory.load(folder.path)
    metrics = {"val_loss": checkpoint.val_loss} if checkpoint.val_loss is not None else {}
    return Run(folder.path, checkpoint.step, config, model.to(where, kind).eval(), tokenizer, where, metrics)


def find(path: str | Path) -> tuple[RunFolder, Checkpoint]:
    """The run folder and checkpoint that `RUN`, `RUN@best` or `RUN@step` names. CheckpointError: there is none."""
    folder, which = split(path)
    return folder, folder.find(which)


def split(path: str | Path) -> tuple[RunFolder, str | None]:
    """`RUN@which` taken apart; an existing folder whose name holds an @ is taken whole. CheckpointError: no run."""
    text = str(path)
    name, at, which = text.rpartition("@")
    if not at or Path(text).exists():
        name, which = text, ""
    return RunFolder.open(name), which or None


def read_config(folder: RunFolder) -> RunConfig:
    """The resolved configuration of a run. CheckpointError: it is missing; ConfigError: it cannot be read."""
    file = folder.path / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{folder.path} is not a whole run folder: it has no config.yaml")
    return load_config(file)


def read_tokenizer(folder: RunFolder) -> Tokenizer:
    """The tokenizer of a run. TokenizerError: it is missing or damaged."""
    return Tokenizer.load(folder.path / TOKENIZER)


def empty_model(config: ModelConfig) -> Transformer:
    """A model whose weights are about to be loaded: nothing is drawn for them."""
    with torch.device("meta"):
        model = Transformer(config)
    return model.to_empty(device="cpu")


# --- Hugging Face folders ------------------------------------------------------------


def is_exported(path: str | Path) -> bool:
    """Whether a path is a Hugging Face folder and not a run."""
    folder = Path(path)
    return (folder / "config.json").is_file() and not (folder / "run.json").exists()


def words_of(found: Pretrained) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; one of token ids (`12 7 905`) where it has none. The id that ends a text
    is then the one that config.json names, or else the last."""
    if found.tokenizer is not None:
        return found.tokenizer
    size, end = found.config.vocab_size or 0, found.keys.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if not isinstance(end, int) or not 0 <= end < size:
        end = size - 1
        log.warning("config.json names no token that ends a text; %d, the last, is taken for it", end)
    return of_ids(size, end)


def recipe_for(found: Pretrained, words: Path, output: Path) -> RunConfig:
    """A configuration that trains on from a Hugging Face model: its own architecture, gentle steps, and the embedded
    text until another is named. words: where its tokenizer.json is; output: the run folder. ConfigError: none fits."""
    keys = {
        "model": found.config.model_dump(),
        "tokenizer": {"kind": "file", "path": str(words)},
        "data": {"datasets": [{"kind": "embedded"}], "validation_fraction": 0.05, "test_fraction": 0.05},
        "optimizer": {"kind": "adamw", "lr": 2e-5},
        "scheduler": {"kind": "cosine", "warmup_steps": 20},
        "training": {"output_dir": str(output), "sequence_length": min(512, found.config.max_position_embeddings)},
    }
    try:
        return RunConfig.model_validate(keys)
    except ValidationError as error:
        said = "; ".join(str(each["msg"]) for each in error.errors())
        raise ConfigError(f"{found.folder / 'config.json'} makes no run: {said}") from None


# --- weights without a model ------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """What stands on disk, for whoever writes it elsewhere: no model is built where that can be avoided.

    weights    under the names of `hub.names`, read one at a time (of a Hugging Face folder: held in memory)
    tokenizer  None where there are only token ids
    """

    path: Path
    step: int
    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer | None


def stored(path: str | Path) -> Stored:
    """The weights of a run, `RUN@best`, `RUN@step` or Hugging Face folder. CheckpointError, ConfigError: as `load`."""
    if is_exported(path):
        found = pretrained(path)
        dtype = found.weights["model.embed_tokens.weight"].dtype
        return Stored(Path(path), 0, found.config, weights_of(found.model(dtype)), found.tokenizer)
    folder, checkpoint = find(path)
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    words = None if is_of_ids(tokenizer) else tokenizer
    return Stored(folder.path, checkpoint.step, config.model, Shards(checkpoint.path), words)


def _device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not known; possible are cpu, cuda and cuda:N") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but PyTorch finds no CUDA device here; use cpu")
    return where


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    known = DTYPES.get(str(canonical(dtype)))
    if known is None:
        raise ConfigError(f"dtype {dtype!r} is not known; possible are {', '.join(DTYPES)}")
    return known
