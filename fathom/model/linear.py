"""Products with a weight matrix: y = x W^T. A few rows without gradients are multiplied by the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.model.native import kernels
from fathom.model.native.kernels import Kept
from fathom.model.precision import compute_dtype


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K), weight (N, K) -> x W^T (..., N), in the dtype of x, or autocast's."""
    if takes(x, weight, x.numel() // x.shape[-1]):
        return kernels.product(x, weight)
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight)
    dtype = arithmetic(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


def takes(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether the kernels are the faster way for these rows x."""
    return kernels.few(x, rows) and kernels.alike((weight, None))


def arithmetic(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of products of many rows: that of x or autocast, or bfloat16 if the weight is and the processor multiplies it."""
    narrow = weight.dtype == torch.bfloat16 and kernels.serve(x) and kernels.multiplies_bfloat16()
    return weight.dtype if narrow else compute_dtype(x)


class Linear(nn.Linear):
    """y = x W^T without a bias, by `product`; weight (out_features, in_features). trained_by: another way for x and
    weight, used where gradients are wanted (`float8.py`)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.trained_by: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.trained_by is not None and torch.is_grad_enabled():
            return self.trained_by(x, self.weight)
        return product(x, self.weight)

    @property
    def kept(self) -> Kept:
        """As the kernels take it."""
        return self.weight, None

    def takes(self, x: Tensor, rows: int) -> bool:
        """Whether the kernels are the faster way for these rows x."""
        return takes(x, self.weight, rows)

    def dense(self) -> Tensor:
        """The weight as numbers, however it is kept."""
        return self.weight


class Embedding(nn.Embedding):
    """Rows of a matrix (V, D) by token, which can be the output head too."""

    def as_head(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., V)."""
        return product(x, self.weight)

    def dense(self) -> Tensor:
        """The weight as numbers, however it is kept."""
        return self.weight
