"""Products with a weight matrix: y = x W^T. A few rows without gradients are multiplied by the compiled kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fathom.model.native import kernels
from fathom.model.native.kernels import Kept


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K), weight (N, K) of one dtype -> x W^T (..., N)."""
    if x.dtype == weight.dtype and kernels.few(x, x.numel() // x.shape[-1]):
        return kernels.product(x, weight)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """y = x W^T without a bias, by `product`; weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)

    @property
    def kept(self) -> Kept:
        """As the kernels take it."""
        return self.weight, None

    def takes(self, x: Tensor, rows: int) -> bool:
        """Whether the kernels are the faster way for these rows x."""
        return x.dtype == self.weight.dtype and kernels.few(x, rows)

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
