"""What contestants are given: one model in the format of each, the same rows of text, the same prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fathom.config.text import dump
from fathom.data.corpus import training_texts
from fathom.data.sources import Embedded, documents
from fathom.errors import ConfigError, TokenizerError
from fathom.hub.gguf import export_gguf
from fathom.hub.huggingface import export, weights_of
from fathom.hub.names import names_of
from fathom.load import TOKENIZER, load
from fathom.log import log
from fathom.model.cost import Cost
from fathom.model.transformer import Transformer
from fathom.optim.schedule import ConstantConfig
from fathom.pretrain import build_model
from fathom.recipe import RunConfig, load_config
from fathom.runtime.device import Device
from fathom.runtime.seed import generator as chance
from fathom.tokenizer.ids import is_of_ids
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.tokenizer.train import build as build_tokenizer
from fathom.train.checkpoint import RunFolder
from fathom.train.state import TrainState

TEXT = 1 << 17  # tokens of the embedded text that rows and prompts are cut from


class Material:
    """Everything is made when first wanted, in a scratch folder.

    name    what the bench was given;   source  its path if the weights were trained, None if they are random
    run     the configuration, its vocabulary known
    """

    def __init__(
        self, name: str, run: RunConfig, model: Transformer, tokenizer: Tokenizer, scratch: Path, source: str | None
    ) -> None:
        self.name, self.run, self.model, self.tokenizer = name, run, model, tokenizer
        self.scratch, self.source = scratch, source
        self.words = None if is_of_ids(tokenizer) else tokenizer
        self.cost = Cost(run.model)
        self._made: dict[str, Path] = {}
        self._text: np.ndarray | None = None

    @classmethod
    def of(cls, given: str, overrides: Sequence[str], scratch: Path) -> Material:
        """A YAML file, whose model gets random weights, or a run or exported folder. ConfigError, CheckpointError: it
        cannot be read."""
        if Path(given).suffix in (".yaml", ".yml"):
            return cls.from_config(given, load_config(given, overrides), scratch)
        if overrides:
            raise ConfigError(f"{' '.join(overrides)}: settings are laid over a YAML file, and {given} is a run")
        opened = load(given)
        return cls(given, opened.config, opened.model, opened.tokenizer, scratch, str(Path(given).absolute()))

    @classmethod
    def from_config(cls, name: str, run: RunConfig, scratch: Path, tokenizer: Tokenizer | None = None) -> Material:
        """Random weights: those with which a training from this configuration begins."""
        if tokenizer is None:
            tokenizer = build_tokenizer(run.tokenizer, lambda: training_texts(run.data))
        if run.model.vocab_size is None:
            sized = run.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
            run = run.model_copy(update={"model": sized})
        plain = run.model_copy(update={"hardware": run.hardware.model_copy(update={"compile": False})})
        model = build_model(plain, Device(torch.device("cpu"), "cpu")).eval()
        return cls(name, run, model, tokenizer, scratch, None)

    def facts(self) -> dict[str, Any]:
        """What is benched, for JSON."""
        model = self.run.model
        return {
            "config": self.name,
            "weights": "random" if self.source is None else "trained",
            "parameters": self.cost.parameters(),
            "active_parameters": self.cost.active_parameters(),
            "attention": model.attention.kind,
            "layers": model.num_hidden_layers,
            "experts": model.moe.n_routed_experts if model.moe else None,
            "vocab_size": model.vocab_size,
        }

    # --- the model

    def place(self) -> str:
        """Where Fathom itself opens the model: what was given, or a run folder that holds the random weights."""
        return self.source or self.native()

    def native(self) -> str:
        """The model as a run folder of its own."""
        if "run" not in self._made:
            folder = RunFolder.create(self.scratch / "run")
            folder.write("config.yaml", dump(self.run))
            self.tokenizer.save(folder.path / TOKENIZER)
            state, names = {"state": TrainState().to_dict()}, names_of(self.run.model)
            folder.save(0, self.model.state_dict(), {}, {}, state, names)
            self._made["run"] = folder.path
        return str(self._made["run"])

    def folder(self) -> Path:
        """A Hugging Face folder in float32, without MTP. ConfigError: no family holds the model."""
        if "hf" not in self._made:
            with _unsaid():
                weights, place = weights_of(self.model), self.scratch / "hf"
                export(self.run.model, weights, place, self.words, mtp=False, dtype="float32")
            self._made["hf"] = place
        return self._made["hf"]

    def gguf(self, kind: str) -> Path:
        """A GGUF file: f32, bf16 or q8_0. ConfigError: llama.cpp has no place for the model or its tokenizer."""
        name = f"model-{kind}.gguf"
        if name not in self._made:
            weights = weights_of(self.model)
            self._made[name] = export_gguf(self.run.model, weights, self.scratch / name, self.words, kind=kind)
        return self._made[name]

    def recipe(self, precision: str, batch: int, micro_batches: int, threads: int, device: str) -> Path:
        """Our own configuration for the trainer: the bench's batch, a constant learning rate, nothing else changed."""
        run = self.run
        training: dict[str, Any] = {
            "batch_size": batch,
            "gradient_accumulation_steps": micro_batches,
            "max_steps": 1_000_000,
        }
        training |= {"output_dir": str(self.scratch / "nowhere")}
        accelerator = "cuda" if device.startswith("cuda") else "cpu"
        hardware = {"precision": precision, "threads": threads, "accelerator": accelerator}
        changed = run.model_copy(
            update={
                "training": run.training.model_copy(update=training),
                "hardware": run.hardware.model_copy(update=hardware),
                "scheduler": ConstantConfig(kind="constant"),
            }
        )
        path = self.scratch / f"recipe-{precision}.yaml"
        path.write_text(dump(changed), encoding="utf-8")
        return path

    # --- the text

    def text(self) -> np.ndarray:
        """(n) int32 tokens of the embedded text, or of chance where the tokenizer knows no words."""
        if self._text is None:
            known = min(self.tokenizer.vocab_size, self.run.model.vocab_size or 0)
            try:
                self._text = tokens_of(self.tokenizer, documents(Embedded(kind="embedded"), "train"))
            except TokenizerError:
                drawn = torch.randint(known, (TEXT,), generator=chance(0, "bench", "text"))
                self._text = drawn.numpy().astype(np.int32)
        return self._text

    def rows(self, length: int, count: int) -> Path:
        """A .npy file of (count, length + 1) tokens."""
        name = f"rows-{length}-{count}.npy"
        if name not in self._made:
            text = self.text()
            wanted = count * (length + 1)
            text = np.tile(text, -(-wanted // len(text)))
            np.save(self.scratch / name, text[:wanted].reshape(count, length + 1))
            self._made[name] = self.scratch / name
        return self._made[name]

    def prompts(self, rows: int, length: int, *turn: str | int) -> list[list[int]]:
        """As many prompts of one length; others for every turn, so that nobody's prefix cache helps."""
        text = self.text()
        room = len(text) - length
        if room < 1:
            raise ConfigError(f"a context of {length} tokens is asked for, and the text has {len(text)}")
        starts = torch.randint(room, (rows,), generator=chance(0, "bench", "prompts", rows, length, *turn))
        return [text[start : start + length].tolist() for start in starts.tolist()]


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keep back what an export says about engines that do not take part."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def tokens_of(tokenizer: Tokenizer, texts: Iterable[str], most: int = TEXT) -> np.ndarray:
    """(n) int32: the first tokens of texts, each with its end."""
    found: list[int] = []
    for text in texts:
        found += [*tokenizer.encode(text), tokenizer.eos_id]
        if len(found) >= most:
            break
    return np.array(found[:most], dtype=np.int32)
