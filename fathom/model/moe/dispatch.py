"""Carrying tokens to experts and back, in permutations.

n tokens with K choices each are n K assignments. Sorted by expert (stably, so that order is a pure function of the
choices), each expert's share is one run of rows. Sending is a gather and bringing back a gather that sums K rows, and
each is the other's backward pass: no scatter with colliding writes, hence the same bits in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Route(NamedTuple):
    """order (n K): the assignment at each sorted row; inverse (n K): the sorted row of each assignment; counts (E):
    rows of each expert; all int64. k: K."""

    order: Tensor
    inverse: Tensor
    counts: Tensor
    k: int


def route(experts: Tensor, n_experts: int) -> Route:
    """Sort the assignments experts (n, K) by expert."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return Route(order, inverse, torch.bincount(flat, minlength=n_experts), experts.shape[1])


def _gather(x: Tensor, path: Route) -> Tensor:
    """x (n, D) -> (n K, D): at each sorted row, the token it belongs to."""
    return x.index_select(0, path.order.div(path.k, rounding_mode="floor"))


def _gather_sum(y: Tensor, path: Route) -> Tensor:
    """y (n K, D) -> (n, D): the sum of a token's K rows. An embedding bag is that in one pass."""
    return F.embedding_bag(path.inverse.view(-1, path.k), y.contiguous(), mode="sum")


def _keep(ctx: Any, path: Route) -> None:
    ctx.save_for_backward(path.order, path.inverse, path.counts)
    ctx.k = path.k


def _kept(ctx: Any) -> Route:
    order, inverse, counts = ctx.saved_tensors
    return Route(order, inverse, counts, ctx.k)


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
    """x (n, D) -> (n K, D), each token once for every expert it chose, sorted by expert."""
    return _Send.apply(x, path)


def sort_weights(weights: Tensor, path: Route) -> Tensor:
    """weights (n, K) -> (n K), in the order of `send`."""
    return weights.flatten().index_select(0, path.order)


def bring_back(y: Tensor, path: Route) -> Tensor:
    """y (n K, D), in the order of `send` -> (n, D), the K rows of each token added."""
    return _BringBack.apply(y, path)
