"""The compiled kernels as functions of tensors: what a few tokens need of a model on a CPU.

Their slow twins stand where the formulas are: F.linear, RMSNorm, Rope.turn_plain, Router, experts_loop, MLA._expanded.
x is float32 or bfloat16 and is widened; y has the dtype of x. Weights are float32, bfloat16, or int8 with a float32
scale for each row of W, and then x is rounded to 16 bits of the largest number of its row. A token's result does not
depend on how many are computed together.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fathom.model.native.build import library

FEW = 64  # rows, up to which reading W once is what counts; the library is made for more ...
FEW_BFLOAT16 = 4  # ... and sooner better, where the processor multiplies bfloat16
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_I, _F, _N, _P = ctypes.c_int, ctypes.c_float, ctypes.c_int64, ctypes.c_void_p
SIGNATURES = {
    "fathom_product": (_I, _P, _N, _N, _P, _P, _N, _N, _P, _I),
    "fathom_feed": (_I, *[_P] * 6, _P, _N, _P, _P, *[_N] * 4, _P, _I),
    "fathom_latent": (_I, _I, *[_N] * 8, _P, _N, _P, _P, _N, _N, _P, _N, _N, _P, _P, _N, _N, _I, _F, _P, _I),
    "fathom_rms_norm": (_P, _N, _N, _N, _P, _F, _P, _I),
    "fathom_turn": (_P, *[_N] * 5, _P, _P, _P, _I),
    "fathom_route": (_I, _P, _N, _N, _P, _P, _N, _N, _I, _I, _F, _N, _N, _I, _P, _P, _P, _P, _I),
}


@functools.cache
def _function(name: str) -> Any:
    found = library()
    assert found is not None
    function = getattr(found, name)
    function.argtypes, function.restype = SIGNATURES[name], None
    return function


def serve(x: Tensor) -> bool:
    """Whether the kernels can be asked about x: on a CPU, no gradient wanted, of a dtype they know, compiled."""
    return (
        not torch.is_grad_enabled()
        and (x.dtype == torch.float32 or x.dtype == torch.bfloat16)
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and library() is not None
    )


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether PyTorch has fast bfloat16 products on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_in_bfloat16(x: Tensor) -> bool:
    """Whether PyTorch's own way with bfloat16 is to be avoided for x."""
    return serve(x) and not multiplies_bfloat16()


def few(x: Tensor, rows: int) -> bool:
    """Whether the kernels are faster than PyTorch's products for so many rows: they are few, or in bfloat16 on a
    processor that has no such products."""
    if x.dtype == torch.bfloat16:
        return rows > 0 and serve(x) and (rows <= FEW_BFLOAT16 or not multiplies_bfloat16())
    return 0 < rows <= FEW and serve(x)


def product(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), scales (N) with int8 -> x W^T (..., N)."""
    count, width = weight.shape
    wide = x.float().contiguous()
    y = torch.empty(*x.shape[:-1], count)
    _function("fathom_product")(
        KINDS[weight.dtype], wide.data_ptr(), wide.numel() // width, width, weight.data_ptr(), _at(scales), count,
        width, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y.to(x.dtype)


Kept = tuple[Tensor, Tensor | None]
"""A matrix, or one for each expert, and the scales of its rows if it is int8."""


def network(x: Tensor, gate: Kept, up: Kept, down: Kept) -> Tensor:
    """x (n, D), gate and up (I, D), down (D, I) -> W_down (silu(W_gate x) * W_up x) (n, D)."""
    (w_gate, s_gate), (w_up, s_up), (w_down, s_down) = gate, up, down
    scales = (_at(s_gate), _at(s_up), _at(s_down))
    return _feed(
        x, None, None, w_gate.dtype, (w_gate.data_ptr(), w_up.data_ptr(), w_down.data_ptr()), scales, len(w_up)
    )


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Kept, down: Kept) -> Tensor:
    """x (n, D), chosen (n, K) int64, weights (n, K) float32, gate_up (E, 2 I, D), down (E, D, I) -> (n, D), a token's
    K outputs weighted and added, in the order of the experts."""
    (enter, s_enter), (leave, s_leave) = gate_up, down
    count, width = len(enter), leave.shape[2]
    first, half = enter.data_ptr(), width * enter.shape[2] * enter.element_size()
    scales = (None, None, None) if s_enter is None else (_at(s_enter), s_enter.data_ptr() + 4 * width, _at(s_leave))
    places = (first, first + half, leave.data_ptr())
    return _feed(x, chosen.contiguous(), weights.contiguous(), enter.dtype, places, scales, width, count)


def _feed(
    x: Tensor, chosen: Tensor | None, weights: Tensor | None, kind: torch.dtype, places: tuple[int, ...],
    scales: tuple[int | None, ...], width: int, experts: int = 1,
) -> Tensor:  # fmt: skip
    """places, scales: addresses of gate, up and down, of the first expert where there are some."""
    n, outer = x.shape
    wide, y = x.float().contiguous(), torch.empty(n, outer)
    _function("fathom_feed")(
        KINDS[kind], *places, *scales, wide.data_ptr(), n, _at(chosen), _at(weights),
        1 if chosen is None else chosen.shape[1], experts, outer, width, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y.to(x.dtype)


def latent_attention(
    q: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, weight: Tensor, mask: Tensor | None, causal: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    """`MLA._absorbed`: q (B, T, N, H), q_rope (B, T, N, R), c (B, S, C), k_rope (B, S, R), weight (N (H + V), C),
    mask (B or 1, 1, T, S) -> (B, T, N, V)."""
    rows, new, heads, plain = q.shape
    seen, latent = c.shape[1:]
    rotary, value = k_rope.shape[2], weight.shape[0] // heads - plain
    wide, turned = q.float(), q_rope.float().contiguous()
    if wide.stride(3) != 1 or wide.stride(1) != heads * wide.stride(2) or wide.stride(0) != new * wide.stride(1):
        wide = wide.contiguous()
    y = torch.empty(rows, new, heads, value)
    masked: tuple[int | None, int, int] = (None, 0, 0)
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        masked = (mask.data_ptr(), mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2))
    _function("fathom_latent")(
        KINDS[weight.dtype], KINDS[c.dtype], rows, new, seen, heads, plain, rotary, value, latent, wide.data_ptr(),
        wide.stride(2), turned.data_ptr(), c.data_ptr(), c.stride(0), c.stride(1), k_rope.data_ptr(), k_rope.stride(0),
        k_rope.stride(1), weight.data_ptr(), *masked, causal, scale, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y.to(q.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D) -> (..., D)."""
    width = x.shape[-1]
    wide, weight = x.float().contiguous(), weight.float()
    y = torch.empty(x.shape)
    _function("fathom_rms_norm")(
        wide.data_ptr(), wide.numel() // width, width, width, weight.data_ptr(), eps, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y.to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, N, R), cos and sin (B, T, 1, R / 2) float32 -> (B, T, N, R), neighbours turned."""
    rows, new, heads, rotary = x.shape
    wide = x.float()
    if wide.stride(3) != 1 or wide.stride(0) != new * wide.stride(1):
        wide = wide.contiguous()
    y = torch.empty(x.shape)
    _function("fathom_turn")(
        wide.data_ptr(), rows * new, heads, rotary, wide.stride(1), wide.stride(2), cos.data_ptr(), sin.data_ptr(),
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y.to(x.dtype)


def route(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, *, sigmoid: bool, normalised: bool, scale: float, groups: int,
    kept_groups: int, best_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`Router`: x (n, D), weight (E, D), bias (E) float32 -> experts (n, K) int64, weights (n, K), scores (n, E),
    logits (n, E)."""
    n, width = x.shape
    count = len(weight)
    wide = x.float().contiguous()
    chosen = torch.empty(n, k, dtype=torch.int64)
    weights, scores, logits = torch.empty(n, k), torch.empty(n, count), torch.empty(n, count)
    _function("fathom_route")(
        KINDS[weight.dtype], wide.data_ptr(), n, width, weight.data_ptr(), bias.data_ptr(), count, k, sigmoid,
        normalised, scale, groups, kept_groups, best_two, chosen.data_ptr(), weights.data_ptr(), scores.data_ptr(),
        logits.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return chosen, weights, scores, logits


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
