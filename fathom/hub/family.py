"""What a family of Hugging Face models is to us: four translations, and what cannot be translated.

    describe    our configuration      -> config.json
    understand  config.json            -> our configuration
    outward     our tensors on disk    -> the family's
    inward      the family's tensors   -> ours on disk

"Ours on disk" is the layout of `names.py`. All weights are mappings from name to tensor that may read lazily, and all
translations go tensor by tensor. `outward` also runs on the device `meta`, which is how names and shapes are known
before a number is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor

from fathom.errors import ConfigError
from fathom.hub.names import places
from fathom.model.moe.layer import MoEConfig
from fathom.model.transformer import ModelConfig

Keys = Mapping[str, Any]
Weights = Mapping[str, Tensor]
Stream = Iterator[tuple[str, Tensor]]
BIAS = "e_score_correction_bias"
FFN = ("gate_proj", "up_proj", "down_proj")


class Family(ABC):
    """One family: its name in config.json, the class that transformers has for it, and the translations."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]

    @abstractmethod
    def obstacles(self, config: ModelConfig, weights: Weights) -> list[str]:
        """Why the family cannot hold a model, each with the way out; empty when it can."""

    @abstractmethod
    def describe(self, config: ModelConfig) -> dict[str, Any]:
        """config.json of a model without obstacles."""

    @abstractmethod
    def understand(self, keys: Keys, weights: Weights) -> ModelConfig:
        """Our configuration of a config.json. ConfigError: a model that ours is not."""

    @abstractmethod
    def outward(self, config: ModelConfig, keys: Keys, weights: Weights) -> Stream:
        """The family's tensors out of ours, one at a time; views where nothing changes."""

    @abstractmethod
    def inward(self, config: ModelConfig, keys: Keys, weights: Weights) -> Stream:
        """Our tensors out of the family's, one at a time, in the order of `names.places`."""

    def copies(self, config: ModelConfig) -> dict[str, str]:
        """Names that may stand in a checkpoint beside its tensors -> the tensor that they must equal."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


# --- what the families share ------------------------------------------------------------


def shared_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys that every family has."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    rest = ("hidden_act", "rms_norm_eps", "initializer_range", "tie_word_embeddings")
    return {key: getattr(config, key) for key in (*sizes, *rest)}


def built(model_type: str, keys: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig of keys from a config.json. ConfigError: what is missing or impossible."""
    try:
        return ModelConfig.model_validate(keys)
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(str(step) for step in e['loc'] if step not in ('gqa', 'mla'))}: {e['msg']}"
            for e in error.errors()
        )
        raise ConfigError(f"this {model_type} config.json cannot be read as a model: {said}") from None


def needed(keys: Keys, *names: str) -> dict[str, Any]:
    """Keys without which there is no model. ConfigError names those that are missing."""
    missing = [name for name in names if keys.get(name) is None]
    if missing:
        raise ConfigError(f"config.json has no {', '.join(missing)}; give the one that belongs to the weights")
    return {name: keys[name] for name in names}


def insist(keys: Keys, wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """ConfigError where a key that is present (and not null) has none of the values that our model is equal to."""
    wrong = [
        f"{name} is {keys[name]!r}, and only {' or '.join(map(repr, values))} can be read"
        for name, values in wanted.items()
        if keys.get(name) is not None and keys[name] not in values
    ]
    if wrong:
        raise ConfigError(f"this {keys.get('model_type')} config.json asks for another model: {'; '.join(wrong)}")


PLAIN = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_bias": (False,)}


def moe_layers(config: ModelConfig) -> list[int]:
    """The layers of the trunk that are MoE."""
    return [i for i in range(config.num_hidden_layers) if config.moe_of(i) is not None]


def lead(config: ModelConfig) -> int | None:
    """k where the layers k, k + 1, ... to the last are the MoE layers; None for any other pattern."""
    layers, count = moe_layers(config), config.num_hidden_layers
    return count - len(layers) if layers == list(range(count - len(layers), count)) else None


def mixture(config: ModelConfig) -> MoEConfig | None:
    """The MoE of a model that has a MoE layer."""
    return config.moe if moe_layers(config) else None


def has_uneven_bias(weights: Weights) -> bool:
    """Whether any selection bias is not the same for all experts; one that is changes no choice."""
    biases = (weights[name] for name in weights if name.endswith(BIAS))
    return any(bool((bias != bias.flatten()[0]).any()) for bias in biases)


def zeros(weights: Weights, name: str) -> bool:
    """Whether a tensor is there and all zero."""
    return name in weights and not bool(weights[name].any())


def layer_of(name: str) -> tuple[int, str] | None:
    """model.layers.3.mlp.x -> (3, "mlp.x"); None outside layers."""
    if not name.startswith("model.layers."):
        return None
    _, _, number, rest = name.split(".", 3)
    return int(number), rest


def widened(tensor: Tensor, part: str, width: int) -> Tensor:
    """A matrix of a feed-forward network with zeros up to a larger width; the network stays the same function."""
    dim = 1 if part == "down_proj" else 0
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim=dim)


def disk_names(config: ModelConfig) -> Iterator[str]:
    """Every name of ours on disk, layer by layer."""
    return iter(places(config))
