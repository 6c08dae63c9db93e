"""Causal attention to train with on a CPU, a block of query rows at a time.    Dao et al. 2022 (2205.14135) in products

    S = scale Q K^T,   P = softmax(S),   O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(dO * O)),   dQ = scale dS K,   dK = scale dS^T Q

Queries a .. b - 1 meet keys 0 .. b - 1: with blocks of 64 and 512 tokens, 44 % of the products are never made. What
stands in memory is one block's scores; the backward pass makes them again from their logsumexp. Heads of v may be
narrower than those of q and k, and are not padded.

PyTorch's fused kernel for CPUs wants equal heads and makes its backward pass whole. Milliseconds on one AVX2 core,
forward and backward, the kernel's first:

    rows x tokens, heads of q and v
    4 x 512, 8 of 96 and 64       119 + 303    96 + 172       configs/bench-129m.yaml
    4 x 512, 8 of 64 and 64        84 + 194    83 + 144
    8 x 256, 4 of 48 and 32        18 +  38    21 +  31
    16 x 128, 4 of 32 and 32        8 +  16    13 +  19
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # queries: their scores against 512 keys stay in a core's cache, head by head
LEAST = 256  # tokens


def suits(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Whether `attend_in_blocks` is the faster way."""
    return (
        causal
        and LEAST <= q.shape[1] == k.shape[1]
        and q.dtype == torch.float32
        and q.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int = BLOCK) -> Tensor:
    """softmax(scale q k^T + causal mask) v; q (B, T, N, H), k (B, T, N_kv, H), v (B, T, N_kv, V) -> (B, T, N, V)."""
    rows, heads = q.shape[0], q.shape[2]
    groups = heads // k.shape[2]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B N, T, H)
    return _Causal.apply(q, k, v, scale, block).unflatten(0, (rows, heads)).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, start: int, end: int, scale: float) -> Tensor:
    """S of queries start .. end - 1 against the keys up to each, -inf above."""
    scores = torch.bmm(q[:, start:end], k[:, :end].mT).mul_(scale)
    future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu_(1)
    scores[:, :, start:].masked_fill_(future, float("-inf"))
    return scores


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, block: int) -> Tensor:
        length = q.shape[1]
        out = v.new_empty(v.shape)
        sums = q.new_empty(*q.shape[:2], 1)  # logsumexp of a query's scores
        for start in range(0, length, block):
            end = min(start + block, length)
            scores = _scores(q, k, start, end, scale)
            sums[:, start:end] = torch.logsumexp(scores, -1, keepdim=True)
            out[:, start:end] = torch.bmm(scores.sub_(sums[:, start:end]).exp_(), v[:, :end])
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.scale, ctx.block = scale, block
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, sums = ctx.saved_tensors
        grad, length = gradients[0], q.shape[1]
        grad_q, grad_k, grad_v = q.new_empty(q.shape), torch.zeros_like(k), torch.zeros_like(v)
        inner = (grad * out).sum(-1, keepdim=True)
        for start in range(0, length, ctx.block):
            end = min(start + ctx.block, length)
            here, seen = slice(start, end), slice(0, end)
            weights = _scores(q, k, start, end, ctx.scale).sub_(sums[:, here]).exp_()
            grad_v[:, seen].baddbmm_(weights.mT, grad[:, here])
            slope = torch.bmm(grad[:, here], v[:, seen].mT).sub_(inner[:, here]).mul_(weights).mul_(ctx.scale)
            grad_q[:, here] = torch.bmm(slope, k[:, seen])
            grad_k[:, seen].baddbmm_(slope.mT, q[:, here])
        return grad_q, grad_k, grad_v, None, None
