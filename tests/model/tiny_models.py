"""Models small enough for every test: odd sizes, so that a mixed-up dimension cannot pass unseen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fathom.batch import IGNORE, Batch
from fathom.model.attention.cache import Visibility
from fathom.model.init import init_weights
from fathom.model.transformer import ModelConfig, Transformer

VOCABULARY = 29
WIDTH = 20
_YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.707, "mscale_all_dim": 0.707}
_MLA = {"kind": "mla", "num_attention_heads": 3, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6}

ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"kind": "gqa", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6},
    "mqa": {"kind": "gqa", "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4},
    "mha": {"kind": "gqa", "num_attention_heads": 5, "num_key_value_heads": 5},
    "mla": {**_MLA, "v_head_dim": 7},
    "mla_low_rank": {**_MLA, "q_lora_rank": 7, "v_head_dim": 13},
    "mla_yarn": {**_MLA, "q_lora_rank": 7, "v_head_dim": 7, "rope_scaling": _YARN},
}
_MOE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
_GROUPS = {"n_group": 3, "topk_group": 2}
MOES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "seed": {**_MOE, "capacity_factor": 1.25},
    "v2": {**_MOE, **_GROUPS, "topk_method": "group_limited_greedy", "norm_topk_prob": False,
           "routed_scaling_factor": 1.7, "n_shared_experts": 2,
           "balance": {"kind": "sequence_loss", "coefficient": 0.01}},
    "v3": {**_MOE, **_GROUPS, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "n_shared_experts": 1,
           "balance": {"kind": "loss_free", "sequence_loss": 0.01}},
    "batch_loss": {**_MOE, "scoring_func": "sigmoid", "balance": {"kind": "batch_loss", "coefficient": 0.01},
                   "router_z_loss": 0.01},
    "eager": {**_MOE, "moe_intermediate_size": 11, "experts_implementation": "eager", "balance": {"kind": "none"}},
}  # fmt: skip


def tiny_config(
    attention: str | dict[str, Any] = "mla_low_rank", moe: str | dict[str, Any] = "v3", depths: int = 1, **changes: Any
) -> ModelConfig:
    """attention, moe: a name from the tables above, or keys."""
    keys = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 23,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "attention": ATTENTIONS[attention] if isinstance(attention, str) else attention,
        "moe": MOES[moe] if isinstance(moe, str) else moe,
        "mtp": {"num_nextn_predict_layers": depths},
    }
    return ModelConfig.model_validate({**keys, **changes})


def tiny_model(
    attention: str | dict[str, Any] = "mla_low_rank",
    moe: str | dict[str, Any] = "v3",
    depths: int = 1,
    seed: int = 0,
    **changes: Any,
) -> Transformer:
    model = Transformer(tiny_config(attention, moe, depths, **changes))
    init_weights(model, seed)
    return model


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch_of(rows: int = 3, length: int = 11, seed: int = 0) -> Batch:
    stretch = tokens_of(rows, length + 1, seed)
    positions = torch.arange(length).expand(rows, length)
    return Batch(stretch[:, :-1].contiguous(), stretch[:, 1:].contiguous(), positions)


def documents(lengths: list[list[int]], padded_to: int, seed: int = 0) -> Batch:
    """Rows of whole documents of the given lengths, then padding; each document's last target is IGNORE."""
    rows = len(lengths)
    tokens = tokens_of(rows, padded_to, seed)
    targets = torch.full_like(tokens, IGNORE)
    positions, segments = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    for row, row_lengths in enumerate(lengths):
        at = 0
        for number, length in enumerate(row_lengths):
            targets[row, at : at + length - 1] = tokens[row, at + 1 : at + length]
            positions[row, at : at + length] = torch.arange(length)
            segments[row, at : at + length] = number
            at += length
    return Batch(tokens, targets, positions, segments)


class GrowingCache:
    """The simplest `LayerCache`: it concatenates."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, ...] = ()

    @property
    def length(self) -> int:
        return self.kept[0].shape[1] if self.kept else 0

    def places(self, new: int, device: torch.device) -> Tensor:
        return torch.arange(self.length, self.length + new)[None]

    def visible(self, new: int, device: torch.device) -> Visibility:
        return Visibility.of(new, self.length + new, None, device)

    def where(self) -> None:
        return None

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        self.kept = tuple(torch.cat(pair, dim=1) for pair in zip(self.kept, new, strict=True)) if self.kept else new
        return self.kept


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to a share of the larger one's size."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3))
