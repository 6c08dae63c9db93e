"""The door that opens a run: a path -> model, tokenizer, configuration.

    RUN         a run folder: its newest whole checkpoint
    RUN@best    the checkpoint with the lowest validation loss
    RUN@500     the checkpoint of step 500

Only YAML, JSON and safetensors are read: nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fathom.errors import CheckpointError, ConfigError
from fathom.generate.generator import Generator
from fathom.generate.request import SamplingParams
from fathom.hub.names import names_of
from fathom.model.transformer import ModelConfig, Transformer
from fathom.recipe import RunConfig, load_config
from fathom.runtime.device import DTYPES, canonical
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.train.checkpoint import Checkpoint, RunFolder

TOKENIZER = "tokenizer"  # folder of a run with its tokenizer.json


@dataclass(frozen=True)
class Run:
    """A model with what belongs to it.

    path, step   the run folder, and the step whose weights these are
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
    """Open a run for use.

    CheckpointError: no run there, no whole checkpoint, another format. ConfigError: a device or dtype that is not here.
    """
    where, kind = _device(device), _dtype(dtype)
    folder, checkpoint = find(path)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder)
    model = empty_model(config.model)
    checkpoint.load_model(model, names_of(config.model))
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
