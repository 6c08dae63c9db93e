"""Random configurations of every family, small, from a seed."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from tiny_models import tiny_model

from fathom.model.transformer import Transformer


def yarn(dice: Random) -> dict[str, Any] | None:
    if dice.random() < 0.5:
        return None
    mscale = dice.choice([1.0, 0.707])
    return {
        "factor": dice.choice([2.0, 4.0, 40.0]),
        "original_max_position_embeddings": dice.choice([16, 32]),
        "mscale": mscale,
        "mscale_all_dim": dice.choice([mscale, 1.0]),
    }


def mla(dice: Random) -> dict[str, Any]:
    return {
        "kind": "mla",
        "num_attention_heads": dice.choice([2, 3, 4]),
        "q_lora_rank": dice.choice([None, 7]),
        "kv_lora_rank": dice.choice([6, 8]),
        "qk_nope_head_dim": dice.choice([4, 6]),
        "qk_rope_head_dim": dice.choice([2, 6]),
        "v_head_dim": dice.choice([3, 6, 11]),
        "rope_theta": dice.choice([100.0, 10000.0]),
        "rope_scaling": yarn(dice),
    }


def gqa(dice: Random) -> dict[str, Any]:
    heads, kv_heads = dice.choice([(6, 2), (3, 1), (2, 2)])
    scaling = yarn(dice)
    return {
        "kind": "gqa",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dice.choice([None, 4, 6]) if heads != 2 else 6,
        "rope_theta": dice.choice([100.0, 10000.0]),
        "rope_scaling": None if scaling is None else {**scaling, "mscale": 1.0},
    }


def moe(dice: Random, family: str, layers: int) -> dict[str, Any]:
    k = dice.randint(1, 8)
    keys: dict[str, Any] = {"n_routed_experts": 12, "num_experts_per_tok": k, "moe_intermediate_size": 9}
    keys["n_shared_experts"] = dice.choice([0, 1, 2])
    if family.startswith("deepseek"):
        keys["first_k_dense_replace"] = dice.choice([0, 1, layers - 1])
        keys["routed_scaling_factor"] = dice.choice([1.0, 2.5])
        groups, kept = dice.choice([(1, 1), (3, 2), (3, 3), (4, 3)])
        if k <= kept * 12 // groups:
            keys |= {"n_group": groups, "topk_group": kept}
    else:
        keys["layers"] = sorted(dice.sample(range(layers), dice.randint(1, layers)))
    if family == "deepseek_v3":
        return {**keys, "scoring_func": "sigmoid", "norm_topk_prob": dice.random() < 0.7}
    if family == "deepseek_v2":
        method = "group_limited_greedy" if keys.get("n_group", 1) > 1 else dice.choice(["greedy", "noaux_tc"])
        return {**keys, "norm_topk_prob": False, "topk_method": method}
    if family == "qwen2_moe":
        return {**keys, "norm_topk_prob": dice.random() < 0.5}
    return {**keys, "n_shared_experts": 0} if family == "mixtral" else keys


def random_model(family: str, seed: int, depths: int = 0) -> Transformer:
    """A model that the family can hold, with selection biases that matter where it has them."""
    dice = Random(f"{family} {seed}")
    layers = dice.choice([2, 3, 4])
    attention = mla(dice) if family.startswith("deepseek") else gqa(dice)
    scaling = attention["rope_scaling"]
    longest = 32 if scaling is None else int(scaling["factor"] * scaling["original_max_position_embeddings"])
    keys = {
        "hidden_size": 24,
        "intermediate_size": dice.choice([5, 23]),
        "num_hidden_layers": layers,
        "max_position_embeddings": longest,
        "rms_norm_eps": dice.choice([1e-6, 1e-5]),
        "tie_word_embeddings": dice.random() < 0.4,
    }
    sparse = None if family == "llama" else moe(dice, family, layers)
    model = tiny_model(attention, sparse, depths, seed, **keys)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    for layer in model.moe_layers().values():
        spread = 0.3 if family in ("deepseek_v3", "ernie4_5_moe") else 0.0
        layer.gate.e_score_correction_bias.normal_(0, spread, generator=torch.Generator().manual_seed(layer.layer))
        layer.gate.e_score_correction_bias.add_(0.25)
    return model
