"""Data parallelism: every rank has the whole model and a slice of every micro-batch's rows.

Losses are divided by the targets of all ranks before the backward pass, so gradients are *summed*, not averaged, and
the number of ranks changes nothing but the order of the sum.
"""

from __future__ import annotations

import torch
from torch import nn

from fathom.runtime.world import World


class DataParallel:
    """Keeps the model of every rank the same."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self.weights = [w for w in model.parameters() if w.requires_grad]
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                world.broadcast_(tensor)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up the gradients of all ranks. A weight without a gradient here (an expert that no local token chose)
        counts as 0."""
        if self.world.size == 1:
            return
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        self.world.sum_in_buckets_(w.grad for w in self.weights if w.grad is not None)
