"""Keeping experts in balance.         Wang et al. 2024 (2408.15664); DeepSeek-V2 report 2.2.3; DeepSeek-V3 report 2.1.2

Auxiliary-loss-free: a bias is added to the affinities for the choice alone. After each optimizer step, from the loads
of all its micro-batches and ranks,

    b_i += u sign(mean(load) - load_i)              or, proportional,     b_i += u (mean(load) - load_i) / mean(load)

The rate u falls linearly to 0 over the last part of the run; the bias itself stays.

Balance losses, per sequence (or over the whole micro-batch) of T tokens:

    f_i = E / (K T) sum_t 1[i among the top K of s_t],   P_i = mean_t s_t,i / sum_j s_t,j,    L = alpha sum_i f_i P_i

The indicator uses affinities without bias (DeepSeek-V3, eq. 18). z-loss: mean of logsumexp(router logits)^2 (Zoph et
al. 2022).
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fathom.knobs import Knobs


class LossFree(Knobs):
    """Auxiliary-loss-free balancing by a selection bias."""

    kind: Literal["loss_free"] = "loss_free"
    update: Literal["sign", "proportional"] = "sign"
    """The rule: by the sign of the violation, or by its relative size."""
    rate: float = Field(default=1e-3, ge=0)
    """u: how far a bias moves in one optimizer step."""
    decay_from: float = Field(default=0.9, ge=0, le=1)
    """Share of the run after which the rate falls linearly, to 0 at the end."""
    sequence_loss: float = Field(default=0.0, ge=0)
    """alpha of the complementary sequence-wise loss (DeepSeek-V3: 1e-4)."""

    def rate_at(self, progress: float) -> float:
        """u at a share of the run between 0 and 1."""
        if progress <= self.decay_from:
            return self.rate
        return self.rate * max(0.0, 1.0 - progress) / (1.0 - self.decay_from)


class SequenceLoss(Knobs):
    """A balance loss on every sequence (DeepSeek-V2, eq. 23)."""

    kind: Literal["sequence_loss"]
    coefficient: float = Field(default=1e-3, gt=0)
    """alpha."""


class BatchLoss(Knobs):
    """A balance loss on every micro-batch as a whole."""

    kind: Literal["batch_loss"]
    coefficient: float = Field(default=1e-3, gt=0)
    """alpha."""


class NoBalance(Knobs):
    """No balancing."""

    kind: Literal["none"]


BalanceConfig = Annotated[LossFree | SequenceLoss | BatchLoss | NoBalance, Field(discriminator="kind")]


class RoutingReport(NamedTuple):
    """What one MoE layer did in one forward pass. Returned, never accumulated: a recomputed block reports once.

    layer    its number; MTP depth k counts as num_hidden_layers + k
    dropped  () int64: assignments beyond an expert's capacity
    loss     () float32: balance and z-loss, coefficients included; 0 outside training
    experts  (B, T, K) int64: what each token chose, before drops
    weights  (B, T, K) float32: with which weight
    scores   (B, T, E) float32: affinities
    real     (B, T) bool, false at padding; None: there is none
    """

    layer: int
    dropped: Tensor
    loss: Tensor
    experts: Tensor
    weights: Tensor
    scores: Tensor
    real: Tensor | None

    def _of_tokens(self, each: Tensor) -> Tensor:
        """(B, T, ...) -> (n, ...), padding left out."""
        return each.flatten(0, 1) if self.real is None else each[self.real]

    @property
    def counts(self) -> Tensor:
        """(E) int64: how often each expert was chosen, before drops, padding left out."""
        return torch.bincount(self._of_tokens(self.experts).flatten(), minlength=self.scores.shape[-1])

    @property
    def entropy(self) -> Tensor:
        """() float32: of the mean gate distribution, in nats; ln E when all experts are equally liked."""
        scores = self._of_tokens(self.scores)
        mean = (scores / (scores.sum(-1, keepdim=True) + 1e-20)).mean(0)
        return torch.special.entr(mean).sum()


def balance_loss(scores: Tensor, k: int, real: Tensor | None, per_sequence: bool) -> Tensor:
    """sum_i f_i P_i, mean over sequences; scores (B, T, E) float32 without bias, real (B, T) false where padded; ()."""
    n_experts = scores.shape[-1]
    share = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    with torch.no_grad():
        chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(k, dim=-1).indices, 1.0)
    if real is not None:
        share, chosen = share * real.unsqueeze(-1), chosen * real.unsqueeze(-1)
        length = real.sum(1, keepdim=True).to(scores.dtype)
    else:
        length = scores.new_full((scores.shape[0], 1), scores.shape[1])
    likes, loads = share.sum(1), chosen.sum(1)
    if not per_sequence:
        likes, loads, length = (x.sum(0, keepdim=True) for x in (likes, loads, length))
    length = length.clamp(min=1)
    return ((n_experts / k) * (loads / length) * (likes / length)).sum(-1).mean()


def z_loss(logits: Tensor, real: Tensor | None) -> Tensor:
    """mean over tokens of logsumexp(logits)^2; logits (B, T, E) float32; ()."""
    square = logits.logsumexp(-1).square()
    return square.mean() if real is None else (square * real).sum() / real.sum().clamp(min=1)


@torch.no_grad()
def update_bias(rule: str, bias: Tensor, counts: Tensor, rate: float) -> None:
    """One step of the rule above, in place; bias (E) float32, counts (E) of a whole optimizer step."""
    load = counts.to(torch.float32)
    mean = load.mean()
    if rate == 0 or mean == 0:
        return
    violation = mean - load
    bias.add_(violation.sign() if rule == "sign" else violation / mean, alpha=rate)


def max_vio(counts: Tensor) -> float:
    """MaxVio = (max load - mean load) / mean load of one layer (2408.15664, eq. 4); 0 for no load at all."""
    load = counts.to(torch.float64)
    mean = float(load.mean())
    return (float(load.max()) - mean) / mean if mean > 0 else 0.0
