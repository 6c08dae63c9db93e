"""RMSNorm.                                                                      Zhang and Sennrich 2019

    y = w * x / sqrt(mean(x^2) + eps)

The mean is taken in float32 whatever x is, and y has the dtype of x. The backward pass is written by hand, since autograd
through the plain formula keeps four tensors of the size of x where two numbers a row suffice:

    dx = r * (g w) - x * r^3 * mean(g w x),   dw = sum(g x r),   r = 1 / sqrt(mean(x^2) + eps)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula as it stands: the slow twin of `RMSNorm`."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * weight.float()).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Forward and backward of the formula above; saves x, w and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        # ||x||^2 / n, through one reduction instead of a squared copy
        r = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        unit = x.float() * r
        grad = gradients[0].float()
        width = x.shape[-1]
        grad_weight = (grad * unit).reshape(-1, width).sum(0)
        pulled = grad * weight.float()
        inner = (pulled * unit).mean(-1, keepdim=True)
        grad_x = pulled.sub_(unit * inner).mul_(r)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """y (..., D) = w * x / rms(x), in the dtype of x (..., D)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return rms_norm_plain(x, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
