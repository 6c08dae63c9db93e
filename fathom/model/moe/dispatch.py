"""Carrying tokens to experts and back, in permutations.

n tokens with K choices each are n K assignments. Sorted by expert (stably, so that order is a pure function of the
choices), each expert's share is one run of rows. Sending is a gather and bringing back a gather that sums K rows, and
each is the other's backward pass: no scatter with colliding writes, hence the same bits in every run.

Some libraries build a kernel for every number of rows that they have not seen (oneDNN's 16-bit products on CPUs: a
tenth of the rate for the first call of each). Runs can therefore be filled up to a multiple of some number of rows.
What fills them has weight 0, is never brought back and gives no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Route(NamedTuple):
    """order (R): the assignment at each sorted row, R = n K and what fills up; inverse (n K): the sorted row of each
    assignment; rows (E): sorted rows of each expert, sum R; all int64. k: K."""

    order: Tensor
    inverse: Tensor
    rows: Tensor
    k: int


def route(experts: Tensor, n_experts: int, multiple: int = 1) -> Route:
    """Sort the assignments experts (n, K) by expert; each expert's rows are filled up to a multiple of `multiple`."""
    flat, k = experts.flatten(), experts.shape[1]
    order = flat.argsort(stable=True)
    # counted without asking the device for a number, as bincount does: a recorded CUDA graph may not
    ends = torch.searchsorted(flat[order], torch.arange(n_experts, device=flat.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    place = torch.arange(order.numel(), device=order.device)
    rows = counts
    if multiple > 1:
        rows = (counts + (multiple - 1)).div(multiple, rounding_mode="floor") * multiple
        fillers = (rows - counts).cumsum(0) - (rows - counts)  # before an expert's first row
        place = place + fillers[flat[order]]
        # the first assignment, there as good as any, stands in for all
        order = order.new_zeros(int(rows.sum())).index_copy_(0, place, order)
    inverse = torch.empty_like(flat)
    inverse[order[place]] = place
    return Route(order, inverse, rows, k)


def _gather(x: Tensor, path: Route) -> Tensor:
    """x (n, D) -> (R, D): at each sorted row, the token it belongs to."""
    return x.index_select(0, path.order.div(path.k, rounding_mode="floor"))


def _gather_sum(y: Tensor, path: Route) -> Tensor:
    """y (R, D) -> (n, D): the sum of a token's K rows. An embedding bag is that in one pass."""
    return F.embedding_bag(path.inverse.view(-1, path.k), y.contiguous(), mode="sum")


def _keep(ctx: Any, path: Route) -> None:
    ctx.save_for_backward(path.order, path.inverse, path.rows)
    ctx.k = path.k


def _kept(ctx: Any) -> Route:
    order, inverse, rows = ctx.saved_tensors
    return Route(order, inverse, rows, ctx.k)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Route) -> Tensor:
        _keep(ctx, path)
        return _gather(x, path)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather_sum(gradients[0], _kept(ctx)), None


class _BringBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, path: Route) -> Tensor:
        _keep(ctx, path)
        return _gather_sum(y, path)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather(gradients[0], _kept(ctx)), None


def send(x: Tensor, path: Route) -> Tensor:
    """x (n, D) -> (R, D), each token once for every expert it chose, sorted by expert."""
    return _Send.apply(x, path) if torch.is_grad_enabled() else _gather(x, path)


def sort_weights(weights: Tensor, path: Route) -> Tensor:
    """weights (n, K) -> (R), in the order of `send`; 0 for fillers."""
    return weights.new_zeros(path.order.numel()).index_copy(0, path.inverse, weights.flatten())


def bring_back(y: Tensor, path: Route) -> Tensor:
    """y (R, D), in the order of `send` -> (n, D), the K rows of each token added."""
    return _BringBack.apply(y, path) if torch.is_grad_enabled() else _gather_sum(y, path)
