"""All layers of a pass in one call, for one new token a row: what `fathom_layers` of kernels.cpp is told."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.model.native.kernels import KINDS, function

_F, _I, _N, _P = ctypes.c_float, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
NORMS = ("norm", "q_a_norm", "kv_a_norm", "norm_after")
MATRICES = ("q_a", "q_b", "kv_a")
WIDTHS = ("c_block", "c_row", "k_block", "k_row", "inner", "experts", "shared")
NETWORKS = ("gate", "up", "down", "shared_gate", "shared_down")
KIND_NAMES = ("kind", "norm_kind", "kv_b_kind", "router_kind", "cache_kind")


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
        *((name, _N) for name in ("B", "D", "L", "N", "H", "R", "V", "C", "k", "groups", "kept_groups")),
        ("table", _P), ("lengths", _P), ("per_row", _N), ("size", _N),
        *((name, _F) for name in ("eps", "latent_eps", "scale", "weight_scale")),
        *((name, _I) for name in (*KIND_NAMES, "sigmoid", "normalised", "best_two")),
    ]  # fmt: skip


class Where(NamedTuple):
    """Where tokens of B rows lie: token s of row b is token s % size of block table[b, s // size]. table (B, n) and
    lengths (B), tokens of each row, int64 on the CPU."""

    table: Tensor
    lengths: Tensor
    size: int


def through(
    layers: ctypes.Array[Layer], sizes: Sizes, mixtures: int, experts: int, h: Tensor, cos: Tensor, sin: Tensor,
    memory: Sequence[tuple[Tensor, ...]], where: Where,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h (B, 1, D) float32 -> what the last layer leaves (B, 1, D), and of the M = `mixtures` MoE layers experts
    (M, B, 1, K) int64, weights (M, B, 1, K) and scores (M, B, 1, E).

    layers and sizes: what does not change from one pass to the next; they are left as they are. memory: c and k_rope of
    each layer, in blocks; they get the new token, which is the last of each row in `where`. ValueError: other rows.
    """
    if len(where.table) != len(h):
        raise ValueError(f"the cache has {len(where.table)} rows, and {len(h)} tokens came, one a row")
    rows, now, told = len(h), type(layers).from_buffer_copy(layers), Sizes.from_buffer_copy(sizes)
    out, cos, sin = h.clone(memory_format=torch.contiguous_format), cos.contiguous(), sin.contiguous()
    chosen = torch.empty(mixtures, rows, 1, told.k, dtype=torch.int64)
    shares, scores = torch.empty(mixtures, rows, 1, told.k), torch.empty(mixtures, rows, 1, experts)
    for layer, (c, k_rope) in zip(now, memory, strict=True):
        layer.c, layer.k_rope = c.data_ptr(), k_rope.data_ptr()
        layer.c_block, layer.c_row, _ = c.stride()
        layer.k_block, layer.k_row, _ = k_rope.stride()
    told.B, told.cache_kind = rows, KINDS[memory[0][0].dtype]
    told.table, told.lengths = where.table.data_ptr(), where.lengths.data_ptr()
    told.per_row, told.size = where.table.shape[1], where.size
    function("fathom_layers")(
        now, len(now), ctypes.addressof(told), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), chosen.data_ptr(),
        shares.data_ptr(), scores.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, chosen, shares, scores
