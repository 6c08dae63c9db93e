"""Rotary positions in other people's words, and the two orders of rows.

Ours turn neighbouring pairs (2i, 2i + 1), as DeepSeek's, ERNIE's and llama.cpp's do; transformers' Llama-like models
turn (i, i + H / 2). Moving rows of W_q and W_k makes one out of the other, since scores do not depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fathom.errors import ConfigError
from fathom.model.rope import YarnConfig, mscale

YARN_KEYS = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
YARN_KEYS |= {"mscale", "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor"}


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a rotary projection (heads * H, D), from neighbouring pairs to first and second halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def yarn_obstacles(scaling: YarnConfig | None, whole_head: bool) -> list[str]:
    """What of YaRN others compute differently. whole_head: all of a head is turned (GQA)."""
    if scaling is None or scaling.factor == 1:
        return []
    length, scale = scaling.mscale, scaling.mscale_all_dim
    # with whole heads q . k grows by mscale(s, mscale)^2 in all, and outside DeepSeek's models others take mscale as 1
    known = length == 1 if whole_head else bool(length and scale) or (length == 1 and not scale)
    said = f"attention.rope_scaling has mscale {length} and mscale_all_dim {scale}, which others read as mscale 1"
    return [f"{said}; train with mscale: 1.0"] if not known else []


def mla_rope(theta: float, scaling: YarnConfig | None, longest: int) -> dict[str, Any]:
    """Both spellings for MLA. Plain positions are written as YaRN by factor 1, which is the same function, since vLLM
    on CPUs turns the wrong rows under `default`."""
    if scaling is None:
        scaling = YarnConfig(factor=1.0, original_max_position_embeddings=longest)
    said = scaling.model_dump()
    return {
        "rope_parameters": {"rope_theta": theta, **said},
        "rope_scaling": {"type": "yarn", **said},
        "rope_theta": theta,
    }


def gqa_rope(theta: float, scaling: YarnConfig | None) -> dict[str, Any]:
    """Both spellings for GQA; mscale is left out, which means 1."""
    if scaling is None or scaling.factor == 1:
        return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "rope_theta": theta}
    said = {k: v for k, v in scaling.model_dump().items() if not k.startswith("mscale")}
    return {"rope_parameters": {"rope_theta": theta, **said}, "rope_scaling": said, "rope_theta": theta}


def read_rope(keys: Mapping[str, Any], default_theta: float, whole_head: bool) -> dict[str, Any]:
    """rope_theta and rope_scaling of our attention, from either spelling. ConfigError: positions that are
    not ours."""
    rope = _spelled(keys)
    theta = float(rope.get("rope_theta") or keys.get("rope_theta") or default_theta)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor = rope.get("factor")
    if kind == "default" or (kind == "yarn" and factor == 1):
        return {"rope_theta": theta, "rope_scaling": None}
    longest = keys.get("max_position_embeddings") or 0
    original = rope.get("original_max_position_embeddings") or longest
    odd = set(rope) - YARN_KEYS or rope.get("truncate") is False or rope.get("partial_rotary_factor", 1) != 1
    if kind != "yarn" or odd or not original:
        raise ConfigError(
            f"config.json asks for rotary positions {rope}; only plain ones and YaRN on a whole head can be read"
        )
    factor = float(factor or longest / original)
    length, scale = _mscales(rope, whole_head)
    total = mscale(factor, 1.0) if whole_head else mscale(factor, length) / mscale(factor, scale)
    given = rope.get("attention_factor")
    if given is not None and not math.isclose(given, total, rel_tol=1e-6):
        raise ConfigError(
            f"config.json gives attention_factor {given}; only {total:g}, which factor asks for, can be read"
        )
    return {
        "rope_theta": theta,
        "rope_scaling": {
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": float(rope.get("beta_fast") or 32),
            "beta_slow": float(rope.get("beta_slow") or 1),
            "mscale": length,
            "mscale_all_dim": scale,
        },
    }


def _spelled(keys: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters, or else rope_scaling."""
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError("config.json has rotary positions that differ from layer to layer; our layers share them")
    return rope


def _mscales(rope: Mapping[str, Any], whole_head: bool) -> tuple[float, float]:
    """(mscale, mscale_all_dim) of ours. Absent ones count as 1 in the vectors' length and not in the softmax scale."""
    length, scale = float(rope.get("mscale") or 0), float(rope.get("mscale_all_dim") or 0)
    if whole_head and not length and not scale:
        return 1.0, 1.0
    if not whole_head and length and scale:
        return length, scale
    if not whole_head and length in (0, 1) and not scale:
        return 1.0, 0.0
    raise ConfigError(
        f"config.json gives YaRN mscale {rope.get('mscale')} and mscale_all_dim {rope.get('mscale_all_dim')}, which "
        "engines read differently" + ("" if whole_head else "; give both, or neither")
    )
