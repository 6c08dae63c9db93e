"""Carrying tokens to experts and back, in permutations.

n tokens with K choices each are n K assignments. Sorted by expert (stably, so that order is a pure function of the
choices), each expert's share is one run of rows. Both directions are gathers, forward and backward: no scatter with
colliding writes, hence the same bits in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """order (n K): the assignment at each sorted row; inverse (n K): the sorted row of each assignment; counts (E): rows
    of each expert; all int64. k: K."""

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


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order.div(k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, inverse)
        back = y.index_select(0, inverse).unflatten(0, weights.shape)
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), back).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, order, inverse = ctx.saved_tensors
        grad = gradients[0]
        back = y.index_select(0, inverse).unflatten(0, weights.shape)
        grad_weights = torch.bmm(back, grad.unsqueeze(-1)).squeeze(-1).to(weights.dtype)
        token = order.div(weights.shape[1], rounding_mode="floor")
        scaled = weights.flatten().index_select(0, order).to(grad.dtype).unsqueeze(-1)
        return grad.index_select(0, token).mul_(scaled), grad_weights, None, None


def send(x: Tensor, path: Route) -> Tensor:
    """x (n, D) -> (n K, D), each token once for every expert it chose, sorted by expert."""
    return _Send.apply(x, path.order, path.inverse, path.k)


def bring_back(y: Tensor, weights: Tensor, path: Route) -> Tensor:
    """sum_k weights (n, K) * y (n K, D) -> (n, D)."""
    return _Return.apply(y, weights, path.order, path.inverse)
