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
from fathom.model.linear import product
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
    logits = widen(product(hidden, weight))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _HeadCrossEntropy(torch.autograd.Function):
    """Gradients are made on the way forward, chunk by chunk: dz = softmax(z) - onehot, dh = dz W, dW = dz^T h.

    Logits stand transposed, z (V, n) = W h^T: that product and dW = dz h run at the full rate of large products, where
    h W^T and its gradient fall behind (by 7 % on AVX2, by half on AMX). exp(z) is never divided by its sum where it is
    large, but where it was multiplied with something small: dh and h.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, train: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        matrix = weight.to(dtype)
        need_hidden, need_weight = (needed and train for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        exact = torch.promote_types(dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        total = hidden.new_zeros((), dtype=exact)
        # float16 would lose small gradients if they were scaled here, before the loss scale comes
        early = scale if dtype != torch.float16 else 1.0
        buffer = hidden.new_empty(weight.shape[0] * min(chunk, hidden.shape[0]), dtype=exact)
        for start in range(0, hidden.shape[0], chunk):
            rows = hidden[start : start + chunk].to(dtype)
            target = targets[start : start + chunk].unsqueeze(0)
            counted, index = target != IGNORE, target.clamp(min=0)
            wide = buffer[: weight.shape[0] * rows.shape[0]].view(weight.shape[0], -1)
            narrow = _logits_into(wide, rows, matrix)
            top, wanted = wide.amax(0, keepdim=True), wide.gather(0, index)
            mass = wide.sub_(top).exp_().sum(0, keepdim=True)
            total += ((top - wanted + mass.log()) * counted).sum()
            if not (need_hidden or need_weight):
                continue
            share = counted * (early / mass)
            slope = wide.scatter_add_(0, index, -mass)  # dz, but for share
            if narrow is not None:  # in few bits, and float16 ends at 65504: divide first
                slope = torch.mul(wide, share, out=narrow)
            if grad_hidden is not None:
                product = slope.T @ matrix
                grad_hidden[start : start + chunk] = product * share.T if narrow is None else product
            if grad_weight is not None and narrow is None:
                grad_weight.addmm_(slope, rows * share.T)
            elif grad_weight is not None:
                grad_weight += slope @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.late = weight.dtype, scale / early if early else 1.0
        ctx.mark_non_differentiable(total)
        return total * scale, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradients[0] * ctx.late
        if not (scale.device.type == "cpu" and float(scale) == 1):  # usually it is, and no large matrix is copied
            grad_hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
            grad_weight = None if grad_weight is None else grad_weight * scale
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.weight_dtype), None, None, None, None


def _logits_into(wide: Tensor, rows: Tensor, matrix: Tensor) -> Tensor | None:
    """Write W rows^T into wide (float32 or finer). Returns the product in its own dtype, if that is narrower."""
    if rows.dtype == wide.dtype:
        torch.mm(matrix, rows.T, out=wide)
        return None
    narrow = matrix @ rows.T
    wide.copy_(narrow)
    return narrow


def chunk_rows(vocab_size: int) -> int:
    """How many tokens' logits stand in memory at once."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of nats over the targets (n) that are not IGNORE; hidden (n, D), weight (V, D) -> () float32.

    chunk: tokens whose logits stand in memory at once; None: `chunk_rows`.
    """
    return scaled_cross_entropy(hidden, weight, targets, 1.0, chunk)[0]


def scaled_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """scale x `head_cross_entropy`, and the sum itself, detached. Gradients are scaled while they are small."""
    rows = chunk or chunk_rows(weight.shape[0])
    scaled, total = _HeadCrossEntropy.apply(hidden, weight, targets, rows, torch.is_grad_enabled(), scale)
    return scaled, total


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
    hidden, reports = model.trunk(batch.tokens, batch.positions, batch.segments, origins=batch.origins)
    routing = list(reports)
    matrix = model.head_weight
    total, next_token = scaled_cross_entropy(hidden.flatten(0, 1), matrix, batch.targets.flatten(), 1 / count, chunk)
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
        share = weight / depths / count
        part, ahead = scaled_cross_entropy(hidden.flatten(0, 1), matrix, targets.flatten(), share, chunk)
        total = total + part
        sums.append(ahead)
        counts.append((targets != IGNORE).sum())
    balance = torch.stack([r.loss for r in routing]).sum() if routing else total.new_zeros(())
    total = total + balance * batch_share
    return Losses(
        total=total,
        next_token=next_token,
        tokens=(batch.targets != IGNORE).sum(),
        mtp=torch.stack(sums) if sums else total.new_zeros(0),
        mtp_tokens=torch.stack(counts) if counts else batch.targets.new_zeros(0),
        balance=balance.detach(),
        routing=tuple(routing),
    )
