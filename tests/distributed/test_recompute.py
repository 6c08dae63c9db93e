"""Recomputation changes neither results nor gradients, runs a block twice, and reports once."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fathom.distributed.recompute import recomputed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.runs = 0

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, SimpleNamespace]:
        self.runs += 1
        h = self.layer(x) * scale
        return x + h.tanh(), SimpleNamespace(counts=(h > 0).sum(), loss=h.square().mean())


def run(call: object, training: bool = True) -> tuple[Tensor, Tensor, int, int]:
    torch.manual_seed(0)
    blocks = [Block().train(training) for _ in range(3)]
    x = torch.randn(2, 5, requires_grad=True)
    h, losses, counts = x, [], []
    for block in blocks:
        h, report = call(block, h, 0.7)  # type: ignore[operator]
        losses.append(report.loss)
        counts.append(report.counts)
    (h.square().mean() + torch.stack(losses).sum()).backward()
    assert x.grad is not None
    return h.detach(), x.grad, int(torch.stack(counts).sum()), blocks[0].runs


def plain(block: nn.Module, *arguments: object) -> object:
    return block(*arguments)


def test_the_same_twice_over() -> None:
    h, grad, counts, runs = run(plain)
    again = run(recomputed(plain))
    assert torch.equal(h, again[0])
    assert torch.equal(grad, again[1])
    assert counts == again[2]
    assert (runs, again[3]) == (1, 2)


def test_evaluation_does_not_recompute() -> None:
    assert run(recomputed(plain), training=False)[3] == 1
