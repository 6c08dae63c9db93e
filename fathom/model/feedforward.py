"""SwiGLU: y = W_down (silu(W_gate x) * W_up x).                                              Shazeer 2020

The product's backward is written by hand, so that silu's output is rebuilt and not kept, and the gradients of gate
and up go straight to where they are wanted:

    dg = d * u * s (1 + g (1 - s)),   du = d * g s,   s = sigmoid(g)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.model.linear import Linear
from fathom.model.native import kernels
from fathom.model.native.kernels import Kept


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
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; gate and up (..., I) in one dtype."""
    if torch.compiler.is_compiling():
        return swiglu_plain(gate, up)
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    return _SwiGLU.apply(gate, up)


def weighted_swiglu_plain(gate_up: Tensor, weights: Tensor) -> Tensor:
    """weights * silu(gate) * up: the slow twin."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weights.to(gate_up.dtype).unsqueeze(-1)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weights.to(gate_up.dtype).unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weights = ctx.saved_tensors
        grad = gradients[0]
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        pulled = grad * up
        grad_weights = torch.linalg.vecdot(pulled, silu).to(weights.dtype)
        column = weights.to(gate_up.dtype).unsqueeze(-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(silu.mul_(grad), column, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(pulled.mul_(column), gate))
        return out, grad_weights


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """weights * silu(gate) * up for rows [gate ; up]: gate_up (n, 2 I), weights (n) float32 -> (n, I)."""
    if torch.compiler.is_compiling():
        return weighted_swiglu_plain(gate_up, weights)
    if not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weights.to(gate_up.dtype).unsqueeze(-1))
    return _WeightedSwiGLU.apply(gate_up, weights)


class FeedForward(nn.Module):
    """The dense network of a layer, and the shared experts of an MoE layer (one network of their joint width).

    x (..., D) -> (..., D) through width I; no biases.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self.takes(x, rows):
            return kernels.network(x.reshape(rows, -1), *self.kept).view(x.shape)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    def takes(self, x: Tensor, rows: int) -> bool:
        """Whether the kernels are the faster way for these rows x."""
        return self.down_proj.takes(x, rows) and kernels.alike(*self.kept)

    @property
    def kept(self) -> tuple[Kept, Kept, Kept]:
        """gate, up and down, as the kernels take them."""
        return self.gate_proj.kept, self.up_proj.kept, self.down_proj.kept
