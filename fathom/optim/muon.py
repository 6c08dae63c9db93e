"""Muon: momentum made orthogonal.                  Jordan et al. 2024; Liu et al. 2025 (2502.16982); DeepSeek-V4
report 2.4, alg. 1

For each independent matrix W (n x m), every expert of a stack by itself:

    M <- mu M + G
    O  = NS(mu M + G) sqrt(max(n, m)) gamma                 Nesterov; gamma = 0.18 is the update's RMS, so AdamW's lr
       is reused
    W <- W (1 - eta lambda) - eta O

NS brings all singular values to 1: X_0 = M / |M|_F, then ten times X <- a X + b (X X^T) X + c (X X^T)^2 X, eight times
with (a, b, c) = (3.4445, -4.7750, 2.0315), which is fast but stops in [0.68, 1.13], and twice with (2, -1.5, 0.5),
which converges. Five steps, four and one, cost half and bring small singular values less near to 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FAST = (3.4445, -4.7750, 2.0315)
EXACT = (2.0, -1.5, 0.5)
STEPS = 10


def coefficients(steps: int) -> tuple[tuple[float, float, float], ...]:
    """(a, b, c) of each step: a fifth of them, the last, converge."""
    exact = steps // 5
    return (FAST,) * (steps - exact) + (EXACT,) * exact


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = STEPS) -> Tensor:
    """NS of every matrix of (..., n, m) by itself; the result is float32. A matrix of zeros stays one."""
    x = matrices.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).to(dtype).reshape(-1, *sorted(matrices.shape[-2:]))
    for a, b, c in coefficients(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float().reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Parameters (n, m) or stacks (..., n, m) of at least two dimensions. Matrices of one shape are orthogonalized in
    one batched product, which gives each the result that it has alone, up to rounding."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        update_rms: float = 0.18,
        dtype: torch.dtype = torch.float32,
        steps: int = STEPS,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "update_rms": update_rms}
        super().__init__(params, defaults)
        self.dtype, self.steps = dtype, steps
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim < 2:
                    raise ValueError(f"Muon is for matrices; got a parameter of shape {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            shapes: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes[weight.shape[-2:], weight.device].append(weight)
            for alike in shapes.values():
                self._update(alike, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        n, m = weights[0].shape[-2:]
        momentum, lr = group["momentum"], group["lr"]
        looks = []
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            buffer, grad = self.state[weight]["momentum_buffer"], weight.grad
            assert grad is not None
            buffer.mul_(momentum).add_(grad)
            looks.append(torch.add(grad, buffer, alpha=momentum).reshape(-1, n, m))
        updates = orthogonalize(torch.cat(looks), self.dtype, self.steps)
        scale = max(n, m) ** 0.5 * group["update_rms"]
        for weight, update in zip(weights, updates.split([len(look) for look in looks]), strict=True):
            weight.mul_(1 - lr * group["weight_decay"]).add_(update.view_as(weight), alpha=-lr * scale)
