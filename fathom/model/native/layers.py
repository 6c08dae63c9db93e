"""All layers of a pass in one call, for one new token a row: what `fathom_layers` of kernels.cpp is told."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.model.native.kernels import KINDS, Choosing, function

_F, _I, _N, _P = ctypes.c_float, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
NORMS = ("norm", "q_a_norm", "kv_a_norm", "norm_after")
MATRICES = ("q_a", "q_b", "kv_a")
WIDTHS = ("c_batch", "c_row", "k_batch", "k_row", "inner", "experts", "shared")
NETWORKS = ("gate", "up", "down", "shared_gate", "shared_down")


class Layer(ctypes.Structure):
    """`Layer` of kernels.cpp. Addresses of tensors that must live through the call."""

    _fields_ = [
        *((name, _P) for name in NORMS),
        *((part, _P) for name in MATRICES for part in (name, f"{name}_scales")),
        ("kv_b", _P), ("o", _P), ("o_scales", _P), ("c", _P), ("k_rope", _P),
        *((name, _N) for name in WIDTHS),
        ("router", _P), ("bias", _P),
        *((part, _P) for name in NETWORKS for part in (name, f"{name}_scales")),
    ]  # fmt: skip


class Sizes(ctypes.Structure):
    """`Sizes` of kernels.cpp: letters as in model/attention/mla.py, L the queries' rank or 0."""

    _fields_ = [
        *((name, _N) for name in ("B", "S", "D", "L", "N", "H", "R", "V", "C", "k", "groups", "kept_groups")),
        *((name, _F) for name in ("eps", "latent_eps", "scale", "weight_scale")),
        *((name, _I) for name in ("kind", "sigmoid", "normalised", "best_two")),
    ]


def through(
    layers: Sequence[Layer], sizes: Sizes, choosing: Choosing | None, mixtures: int, experts: int,
    weights: torch.dtype, h: Tensor, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h (B, 1, D) float32 -> what the last layer leaves (B, 1, D), and of the M = `mixtures` MoE layers experts
    (M, B, 1, K) int64, weights (M, B, 1, K) and scores (M, B, 1, E). The caches get the new token."""
    rows, k = len(h), 0 if choosing is None else choosing.k
    out, cos, sin = h.clone(memory_format=torch.contiguous_format), cos.contiguous(), sin.contiguous()
    chosen = torch.empty(mixtures, rows, 1, k, dtype=torch.int64)
    shares, scores = torch.empty(mixtures, rows, 1, k), torch.empty(mixtures, rows, 1, experts)
    sizes.kind = KINDS[weights]
    if choosing is not None:
        sizes.k, sizes.sigmoid, sizes.normalised, sizes.weight_scale = choosing[:4]
        sizes.groups, sizes.kept_groups, sizes.best_two = choosing[4:]
    function("fathom_layers")(
        (Layer * len(layers))(*layers), len(layers), ctypes.addressof(sizes), out.data_ptr(), cos.data_ptr(),
        sin.data_ptr(), chosen.data_ptr(), shares.data_ptr(), scores.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, chosen, shares, scores
