"""The compiled kernels as functions of tensors: what a few tokens need of a model on a CPU.

Their slow twins stand where the formulas are: F.linear, RMSNorm, Rope.turn_plain, FeedForward, MoE, MLA.
x and y are float32, and weights float32, bfloat16, or int8 with a float32 scale for each row of W,
and then x is rounded to 16 bits of the largest number of its row. So hidden states are float32 in every model that the
kernels serve (`widened`). A token's result does not depend on how many are computed together.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fathom.model.native.build import library

FEW = 64  # rows, up to which reading W once is what counts; PyTorch's products are made for more
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_I, _F, _N, _P = ctypes.c_int, ctypes.c_float, ctypes.c_int64, ctypes.c_void_p
SIGNATURES = {
    "fathom_product": (_I, _P, _N, _N, _P, _P, _N, _P, _I),
    "fathom_network": (_I, *[_P] * 7, _N, _N, _N, _P, _I),
    "fathom_mixture": (
        _I, _I, _P, _N, _N, _P, _P, _N, _N, _I, _I, _F, _N, _N, _I, *[_P] * 4, _N, *[_P] * 6, _N, *[_P] * 5, _I,
    ),
    "fathom_latent_enter": (_I, _I, _P, _N, _N, *[_P] * 3, _N, *[_P] * 5, _F, *[_N] * 4, *[_P] * 5, _I),
    "fathom_latent_leave": (
        _I, _I, _I, *[_N] * 8, _P, _P, _N, _N, _P, _N, _N, _P, _P, _N, _N, _I, _F, _P, _P, _N, _P, _I,
    ),
    "fathom_layers": (_P, _N, *[_P] * 7, _I),
    "fathom_rms_norm": (_I, _P, _N, _N, _P, _F, _P, _I),
    "fathom_turn": (_P, *[_N] * 5, _P, _P, _P, _I),
}  # fmt: skip


@functools.cache
def function(name: str) -> Any:
    """One of kernels.cpp, with the types of its arguments."""
    found = library()
    assert found is not None
    function = getattr(found, name)
    function.argtypes, function.restype = SIGNATURES[name], None
    return function


def serve(x: Tensor) -> bool:
    """Whether the kernels can be asked about x."""
    return x.dtype == torch.float32 and _wanted(x)


def _wanted(x: Tensor) -> bool:
    """On a CPU, no gradient wanted, compiled."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def widened(h: Tensor) -> Tensor:
    """Embeddings as hidden states: bfloat16 in float32 where the kernels serve, else as they are."""
    return h.float() if h.dtype == torch.bfloat16 and _wanted(h) else h


def few(x: Tensor, rows: int) -> bool:
    """Whether the kernels are faster than PyTorch's products for so many rows x."""
    return 0 < rows <= FEW and serve(x)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether PyTorch has fast bfloat16 products on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


Kept = tuple[Tensor, Tensor | None]
"""A matrix, or one for each expert, and the scales of its rows if it is int8."""


def alike(*kept: Kept | None) -> bool:
    """Whether matrices are kept in one way, which the kernels know, and without gaps."""
    weights = [pair[0] for pair in kept if pair is not None]
    kind = weights[0].dtype
    return kind in KINDS and all(weight.dtype == kind and weight.is_contiguous() for weight in weights)


def addresses(*kept: Kept | None) -> list[int | None]:
    """Of matrices and their scales; None: there is none."""
    found: list[int | None] = []
    for pair in kept:
        weight, scales = (None, None) if pair is None else pair
        found += (_address(weight), _address(scales))
    return found


def product(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), scales (N) with int8 -> x W^T (..., N)."""
    count, width = weight.shape
    x, y = _rows(x), torch.empty(*x.shape[:-1], count)
    function("fathom_product")(
        KINDS[weight.dtype], x.data_ptr(), x.numel() // width, width, *addresses((weight, scales)), count,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def network(x: Tensor, gate: Kept, up: Kept, down: Kept) -> Tensor:
    """x (n, D), gate and up (I, D), down (D, I) -> W_down (silu(W_gate x) * W_up x) (n, D)."""
    n, width = x.shape
    x, y = _rows(x), torch.empty(n, width)
    function("fathom_network")(
        KINDS[down[0].dtype], *addresses(gate, up, down), x.data_ptr(), n, width, gate[0].shape[0],
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


class Choosing(NamedTuple):
    """How a router chooses: `Router`'s knobs."""

    k: int
    sigmoid: bool
    normalised: bool
    scale: float
    groups: int
    kept_groups: int
    best_two: bool


def mixture(
    x: Tensor, router: Tensor, bias: Tensor, choosing: Choosing, gate_up: Kept, down: Kept,
    shared: tuple[Kept, Kept, Kept] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """`MoE`: x (n, D), router (E, D), bias (E) float32, gate_up (E, 2 I, D), down (E, D, I), shared: gate, up and down
    -> y (n, D), and a `Choice`: experts (n, K) int64, weights (n, K), scores (n, E), logits (n, E)."""
    n, width = x.shape
    count, k = router.shape[0], choosing.k
    x, y = _rows(x), torch.empty(n, width)
    chosen, weights = torch.empty(n, k, dtype=torch.int64), torch.empty(n, k)
    scores, logits = torch.empty(2, n, count).unbind(0)
    beside = addresses(*(shared or (None, None, None)))
    function("fathom_mixture")(
        KINDS[down[0].dtype], KINDS[router.dtype], x.data_ptr(), n, width, router.data_ptr(), bias.data_ptr(), count,
        *choosing, *addresses(gate_up, down), down[0].shape[2], *beside,
        0 if shared is None else shared[0][0].shape[0],
        chosen.data_ptr(), weights.data_ptr(), scores.data_ptr(), logits.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, (chosen, weights, scores, logits)


def latent_enter(
    x: Tensor, low: tuple[Kept, Tensor] | None, q: Kept, kv_a: Kept, kv_a_norm: Tensor, eps: float, heads: int,
    rotary: int, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`MLA` up to its cache: x (B, T, D), low: W_dq (L, D) and the weight of its norm, q (N (H + R), D or L), kv_a
    (C + R, D), cos and sin (B, T, 1, R / 2) -> q (B, T, N, H + R) and k_rope (B, T, R), both turned, and c (B, T, C)
    normed."""
    rows, new, width = x.shape
    x, cos, sin = _rows(x), cos.contiguous(), sin.contiguous()
    latent, size = kv_a[0].shape[0] - rotary, q[0].shape[0] // heads
    query = torch.empty(rows, new, heads, size)
    c, k_rope = torch.empty(rows, new, latent), torch.empty(rows, new, rotary)
    function("fathom_latent_enter")(
        KINDS[q[0].dtype], KINDS[kv_a_norm.dtype], x.data_ptr(), rows * new, width, *addresses(low and low[0]),
        _address(low and low[1]), 0 if low is None else low[0][0].shape[0], *addresses(q, kv_a), kv_a_norm.data_ptr(),
        eps,
        heads, size - rotary, rotary, latent, cos.data_ptr(), sin.data_ptr(), query.data_ptr(), c.data_ptr(),
        k_rope.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return query, c, k_rope


def latent_leave(
    q: Tensor, c: Tensor, k_rope: Tensor, kv_b: Tensor, mask: Tensor | None, causal: bool, scale: float, o: Kept
) -> Tensor:
    """`MLA` after its cache, absorbed: q (B, T, N, H + R), c (B, S, C) and k_rope (B, S, R) float32 or bfloat16, kv_b
    (N (H + V), C), mask (B or 1, 1, T, S), o (D, N V) -> (B, T, D)."""
    rows, new, heads, size = q.shape
    seen, latent = c.shape[1:]
    rotary, width = k_rope.shape[2], o[0].shape[0]
    value, y = o[0].shape[1] // heads, torch.empty(rows, new, width)
    masked: tuple[int | None, int, int] = (None, 0, 0)
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        masked = (mask.data_ptr(), mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2))
    function("fathom_latent_leave")(
        KINDS[o[0].dtype], KINDS[kv_b.dtype], KINDS[c.dtype], rows, new, seen, heads, size - rotary, rotary, value,
        latent, q.data_ptr(), c.data_ptr(), c.stride(0), c.stride(1), k_rope.data_ptr(), k_rope.stride(0),
        k_rope.stride(1), kv_b.data_ptr(), *masked, causal, scale, *addresses(o), width, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D) -> (..., D)."""
    width = x.shape[-1]
    x, y = _rows(x), torch.empty(x.shape)
    function("fathom_rms_norm")(
        KINDS[weight.dtype], x.data_ptr(), x.numel() // width, width, weight.data_ptr(), eps, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, N, R), cos and sin (B, T, 1, R / 2) float32 -> (B, T, N, R), neighbours turned."""
    rows, new, heads, rotary = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    if x.stride(3) != 1 or x.stride(0) != new * x.stride(1):
        x = x.contiguous()
    y = torch.empty(x.shape)
    function("fathom_turn")(
        x.data_ptr(), rows * new, heads, rotary, x.stride(1), x.stride(2), cos.data_ptr(), sin.data_ptr(),
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError(f"x is {x.dtype}, and the kernels take float32")
    return x.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
