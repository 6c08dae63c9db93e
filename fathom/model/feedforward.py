"""SwiGLU: y = W_down (silu(W_gate x) * W_up x).                                              Shazeer 2020

The product's backward is written by hand, so that silu's output is rebuilt and not kept:

    dg = d * u * s (1 + g (1 - s)),   du = d * g s,   s = sigmoid(g)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: the slow twin."""
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad = gradients[0]
        silu = F.silu(gate)
        grad_up = grad * silu
        grad_gate = torch.ops.aten.silu_backward((grad * up), gate)
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; gate and up (..., I) in one dtype."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return swiglu_plain(gate, up)
    return _SwiGLU.apply(gate, up)


class FeedForward(nn.Module):
    """The dense network of a layer, and the shared experts of an MoE layer (one network of their joint width).

    x (..., D) -> (..., D) through width I; no biases.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
