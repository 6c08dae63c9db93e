"""Products with a weight matrix: y = x W^T, on a CPU by the fastest of three equal ways.

A few rows are read against the whole of W, and how fast that goes depends on how the product is put to the library.
Measured in float32 on two cores without AVX-512, milliseconds:

    W                 rows      1      2      4      8     16     32     64
    (50257, 512)    x W^T    10.2   21.0   29.0   36.2   41.8   52.9   79.7
                    W x^T     9.7    7.7    7.2   11.8   21.1   32.2   55.2
                    shared    5.5
    (1024, 512)     x W^T    0.21   0.31   0.43   0.40   0.51   0.75   1.23
                    W x^T    0.21   0.16   0.16   0.25   0.39   0.64   1.08
                    shared   0.15

One row is read by one thread alone, at half the speed of memory, unless the rows of W are shared out as a batch of
products. W x^T is the transposed y, which is copied once: whoever reads it next is slow with columns. Where gradients
are recorded, on other devices and in other dtypes it is `F.linear`.
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
    if rows == 1 and weight.numel() >= LEAST and torch.get_num_threads() > 1 and is_plain(x):
        return _shared(x.reshape(1, width), weight).view(*x.shape[:-1], -1)
    if not turns(rows, weight.numel()) or not is_plain(x):
        return F.linear(x, weight)
    turned = torch.mm(weight, x.reshape(rows, width).t())
    return turned.t().contiguous().view(*x.shape[:-1], weight.shape[0])


def _shared(x: Tensor, weight: Tensor) -> Tensor:
    """One row (1, K) of x -> x W^T (N), each thread as many rows of W."""
    count, width = weight.shape
    threads = torch.get_num_threads()
    each = count // threads
    parts = weight[: each * threads].view(threads, each, width)
    y = torch.bmm(parts, x.t().expand(threads, -1, -1)).flatten()  # x as a column, of which the library takes no copy
    return y if each * threads == count else torch.cat((y, F.linear(x, weight[each * threads :])[0]))


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
