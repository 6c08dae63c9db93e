"""RMSNorm.                                                                      Zhang and Sennrich 2019

    y = w * x / sqrt(mean(x^2) + eps)

The mean is taken in float32 whatever x is. y has the dtype of x; under autocast that of the matrix products which
read it, so that it is cast once and not once for every reader. The backward pass is written by hand, since autograd
through the plain formula keeps four tensors of the size of x where x and one number a row suffice:

    dx = r * (g w) - x * r^3 * mean(g w x),   dw = sum(g x r),   r = 1 / sqrt(mean(x^2) + eps)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fathom.model.native import kernels
from fathom.model.precision import compute_dtype, widen


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """The formula as it stands: the slow twin of `RMSNorm`. dtype: of y; None: that of x."""
    wide = widen(x)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * widen(weight)).to(dtype or x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Forward and backward of the formula above; saves x, w and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = widen(x)
        # ||x||^2 / n, through one reduction instead of a squared copy
        r = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(widen(weight)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        unit = widen(x) * r
        grad = widen(gradients[0])
        width = x.shape[-1]
        product = grad * unit
        grad_weight = product.reshape(-1, width).sum(0)
        inner = (
            (product.view(-1, width) @ widen(weight)).view(r.shape).div_(width)
        )  # mean(g w x r), without a copy of g w
        grad_x = (grad * widen(weight)).addcmul_(unit, inner, value=-1).mul_(r)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


class RMSNorm(nn.Module):
    """x (..., D) -> y (..., D)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype in kernels.KINDS and kernels.serve(x):
            return kernels.rms_norm(x, weight, self.eps)
        dtype = compute_dtype(x)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return rms_norm_plain(x, weight, self.eps, dtype)
        return _RMSNorm.apply(x, weight, self.eps, dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
