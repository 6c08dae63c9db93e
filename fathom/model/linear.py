"""Products with a weight matrix: y = x W^T, on a CPU by the faster of two equal ways.

A few rows are read against the whole of W, and how fast that goes depends on how the product is put to the library.
Measured in float32 on two cores without AVX-512, milliseconds:

    W                 rows      2      4      8     16     32     64
    (50257, 512)    x W^T      24     37     50    102    205    184
                    W x^T      11     13     26     51    132    151
    (1024, 512)     x W^T    0.50   0.48   0.62   0.89   1.26   2.03
                    W x^T    0.33   0.29   0.41   0.74   1.17   2.12

One row runs at the speed of memory either way. W x^T is the transposed y, which is copied once: whoever reads it next
is slow with columns. Where gradients are recorded, on other devices and in other dtypes it is `F.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST = 64  # rows
LEAST = 1 << 17  # elements of W; smaller ones are read so quickly that the extra calls cost more ...
LEAST_ALONE = 1 << 20  # ... and one thread alone reads W as well one way as the other, until it is long


def is_plain(x: Tensor) -> bool:
    """Whether x is float32 on a CPU, and only the value of a product is wanted."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def turns(rows: int, size: int) -> bool:
    """Whether W x^T is faster than x W^T, for W of so many elements."""
    return 1 < rows <= MOST and size >= (LEAST if torch.get_num_threads() > 1 else LEAST_ALONE)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K), weight (N, K) of one dtype -> x W^T (..., N)."""
    width = x.shape[-1]
    rows = x.numel() // width
    if not turns(rows, weight.numel()) or not is_plain(x):
        return F.linear(x, weight)
    turned = torch.mm(weight, x.reshape(rows, width).t())
    return turned.t().contiguous().view(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """y = x W^T without a bias, by `product`; weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)

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
