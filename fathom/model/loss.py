"""The training loss.                                                     DeepSeek-V3 report 2.2 (MTP), 2.1.2 (balance)

    L = sum CE / N  +  lambda / D_mtp * sum_k (sum CE_k) / N  +  (balance and z-losses) * share of rows

N counts the targets of all micro-batches and ranks of one optimizer step, so accumulation weighs every token alike.
CE_k runs over the targets of MTP depth k that lie in the same document as their source.

The head and its cross entropy are computed in chunks of tokens, together with their gradients: the logits of a large
vocabulary never stand whole in memory, forward or backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.batch import IGNORE, Batch
from fathom.model.moe.balance import RoutingReport
from fathom.model.precision import compute_dtype, widen
from fathom.model.transformer import Transformer

CHUNK_ELEMENTS = 1 << 21  # logits that stand in memory at once: 8 MB in float32, which a cache may hold ...
CHUNK_ROWS = 256  # ... but at least so many rows, or adding up the weight gradient costs more than it


@dataclass(frozen=True)
class Losses:
    """What one micro-batch gave. total () carries the gradient; everything else is detached.

    next_token ()  sum of nats over its targets;  tokens  how many those are
    mtp (depths)   sum of nats of each MTP depth; mtp_tokens (depths)  how many targets each had
    balance ()     balance and z-losses, coefficients included, summed over layers
    routing        one report a MoE layer
    """

    total: Tensor
    next_token: Tensor
    tokens: Tensor
    mtp: Tensor
    mtp_tokens: Tensor
    balance: Tensor
    routing: tuple[RoutingReport, ...]


def cross_entropy_plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of nats over targets (n) that are not IGNORE, with all logits at once: the slow twin of
    `head_cross_entropy`."""
    logits = widen(F.linear(hidden, weight))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def _logits_into(wide: Tensor, rows: Tensor, matrix: Tensor) -> Tensor | None:
    """Write rows W^T into wide (float32 or finer). Returns the product in its own dtype, if that is narrower."""
    if rows.dtype == wide.dtype:
        torch.mm(rows, matrix.T, out=wide)
        return None
    narrow = rows @ matrix.T
    wide.copy_(narrow)
    return narrow


class _HeadCrossEntropy(torch.autograd.Function):
    """Gradients are made on the way forward, chunk by chunk: dz = softmax(z) - onehot, dh = dz W, dW = dz^T h."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, train: bool) -> Tensor:
        dtype = compute_dtype(hidden)
        matrix = weight.to(dtype)
        need_hidden, need_weight = (needed and train for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        exact = torch.promote_types(dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        total = hidden.new_zeros((), dtype=exact)
        buffer = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0], dtype=exact)
        for start in range(0, hidden.shape[0], chunk):
            rows = hidden[start : start + chunk].to(dtype)
            target = targets[start : start + chunk].unsqueeze(1)
            counted, index = target != IGNORE, target.clamp(min=0)
            wide = buffer[: rows.shape[0]]
            narrow = _logits_into(wide, rows, matrix)
            top, wanted = wide.amax(-1, keepdim=True), wide.gather(1, index)
            mass = wide.sub_(top).exp_().sum(-1, keepdim=True)
            total += ((top - wanted + mass.log()) * counted).sum()
            if not (need_hidden or need_weight):
                continue
            wide.mul_(counted / mass).scatter_add_(1, index, -counted.to(wide.dtype))
            slope = wide if narrow is None else narrow.copy_(wide)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = slope @ matrix
            if grad_weight is not None and narrow is None:
                grad_weight.addmm_(slope.T, rows)
            elif grad_weight is not None:
                grad_weight += slope.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradients[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def chunk_rows(vocab_size: int) -> int:
    """How many tokens' logits stand in memory at once."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of nats over the targets (n) that are not IGNORE; hidden (n, D), weight (V, D) -> () float32.

    chunk: tokens whose logits stand in memory at once; None: `chunk_rows`.
    """
    return _HeadCrossEntropy.apply(
        hidden, weight, targets, chunk or chunk_rows(weight.shape[0]), torch.is_grad_enabled()
    )


def mtp_targets(batch: Batch, depth: int) -> Tensor:
    """Targets (B, T - depth) of an MTP depth: the main targets `depth` further on, where they lie in the document of
    their source."""
    targets = batch.targets[:, depth:]
    if batch.segments is None:
        return targets
    same = batch.segments[:, depth:] == batch.segments[:, :-depth]
    return targets.masked_fill(~same, IGNORE)


def language_model_loss(
    model: Transformer,
    batch: Batch,
    *,
    token_count: int | None = None,
    batch_share: float = 1.0,
    mtp_weight: float | None = None,
    chunk: int | None = None,
) -> Losses:
    """The loss of one micro-batch, as the head of this file has it.

    token_count: N; None: this batch alone. batch_share: its share of the rows of the step. mtp_weight: lambda; None:
    the configuration's first.
    """
    count = max(1, batch.target_count if token_count is None else token_count)
    hidden, reports = model.trunk(batch.tokens, batch.positions, batch.segments)
    routing = list(reports)
    next_token = head_cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten(), chunk)
    total = next_token / count
    sums, counts = [], []
    depths = len(model.mtp)
    weight = model.config.mtp.weight if mtp_weight is None else mtp_weight
    for depth in range(1, depths + 1):
        if batch.tokens.shape[1] <= depth:
            break
        before = hidden[:, : batch.tokens.shape[1] - depth]
        segments = None if batch.segments is None else batch.segments[:, :-depth]
        tokens, positions = batch.tokens[:, depth:], batch.positions[:, :-depth]
        hidden, report = model.look_ahead(depth, before, tokens, positions, segments)
        if report is not None:
            routing.append(report)
        targets = mtp_targets(batch, depth)
        ahead = head_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets.flatten(), chunk)
        total = total + ahead * (weight / depths / count)
        sums.append(ahead.detach())
        counts.append((targets != IGNORE).sum())
    balance = torch.stack([r.loss for r in routing]).sum() if routing else total.new_zeros(())
    total = total + balance * batch_share
    return Losses(
        total=total,
        next_token=next_token.detach(),
        tokens=(batch.targets != IGNORE).sum(),
        mtp=torch.stack(sums) if sums else total.new_zeros(0),
        mtp_tokens=torch.stack(counts) if counts else batch.targets.new_zeros(0),
        balance=balance.detach(),
        routing=tuple(routing),
    )
