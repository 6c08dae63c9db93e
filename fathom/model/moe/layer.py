"""The MoE layer of DeepSeekMoE: y = sum_shared FFN_s(x) + sum_{i in top K} g_i FFN_i(x).     DeepSeek-V2 report 2.2.1

Dropless by default. With a capacity factor, each expert takes at most C = ceil(factor T K / E) assignments of a
micro-batch of T tokens, in training only: earlier positions first, then rows, and never by score, which would let
later tokens decide about earlier ones. What is dropped adds nothing, and the weights of what is kept are not
renormalised.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fathom.knobs import Knobs, Many
from fathom.model.feedforward import FeedForward
from fathom.model.moe.balance import (
    BalanceConfig,
    BatchLoss,
    LossFree,
    RoutingReport,
    SequenceLoss,
    balance_loss,
    z_loss,
)
from fathom.model.moe.dispatch import bring_back, route, send, sort_weights
from fathom.model.moe.experts import Experts, ExpertsImplementation
from fathom.model.moe.router import Choice, Router
from fathom.model.native import kernels


class MoEConfig(Knobs):
    """Mixture of experts."""

    layers: Many[int] | None = None
    """The layers that are MoE, counted from 0; null: by first_k_dense_replace and moe_layer_freq."""
    first_k_dense_replace: int = Field(default=0, ge=0)
    """How many leading layers stay dense (used when layers is null)."""
    moe_layer_freq: int = Field(default=1, gt=0)
    """Every how many layers one is MoE (used when layers is null)."""
    n_routed_experts: int = Field(default=4, gt=0)
    """E."""
    n_shared_experts: int = Field(default=0, ge=0)
    """Experts that every token visits; held as one network of their joint width."""
    num_experts_per_tok: int = Field(default=2, gt=0)
    """K: routed experts of a token."""
    moe_intermediate_size: int = Field(default=2048, gt=0)
    """I: width of one expert."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become affinities: softmax (V2) or sigmoid (V3)."""
    norm_topk_prob: bool = True
    """Divide the chosen weights by their sum (V3) or not (V2)."""
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    """Factor on the weights, after normalisation."""
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    """greedy: no groups; group_limited_greedy: a group scores its best expert (V2); noaux_tc: its best two (V3)."""
    n_group: int = Field(default=1, gt=0)
    """Groups of experts (nodes, in the papers)."""
    topk_group: int = Field(default=1, gt=0)
    """Groups that a token may use."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """null: dropless. Else an expert takes at most ceil(factor T K / E) assignments a micro-batch, in training."""
    balance: BalanceConfig = LossFree()
    """What keeps the experts in balance."""
    router_z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the router's z-loss."""
    router_initializer_range: float | None = Field(default=None, gt=0)
    """Standard deviation of the router's initial weights; null: the model's initializer_range."""
    experts_implementation: ExpertsImplementation = "auto"
    """grouped_mm, eager (a loop), or auto: grouped where PyTorch's kernel can run."""

    @model_validator(mode="after")
    def _possible(self) -> MoEConfig:
        experts, k, groups = self.n_routed_experts, self.num_experts_per_tok, self.n_group
        wrong = []
        if k > experts:
            wrong.append(f"num_experts_per_tok is {k}, more than the {experts} of n_routed_experts")
        if experts % groups:
            wrong.append(f"n_group is {groups}, which does not divide n_routed_experts {experts}")
        elif self.topk_group > groups:
            wrong.append(f"topk_group is {self.topk_group}, more than the {groups} of n_group")
        elif k <= experts and k > self.topk_group * (experts // groups):
            room = self.topk_group * (experts // groups)
            wrong.append(
                f"num_experts_per_tok is {k}, but topk_group {self.topk_group} of {groups} groups hold only {room}"
            )
        elif groups > 1 and self.topk_method == "greedy":
            wrong.append(
                f"topk_method greedy has no groups, but n_group is {groups}; use group_limited_greedy or noaux_tc"
            )
        elif groups > 1 and self.topk_method == "noaux_tc" and experts // groups < 2:
            wrong.append("topk_method noaux_tc adds the two best of a group, but the groups have one expert each")
        if self.layers is not None and (self.first_k_dense_replace, self.moe_layer_freq) != (0, 1):
            wrong.append("layers is given, and first_k_dense_replace or moe_layer_freq too; give one or the other")
        given = list(self.layers or ())
        if given != sorted(set(given)) or min(given, default=0) < 0:
            wrong.append(f"layers is {given}; give each layer once, in rising order from 0")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def is_moe(self, layer: int) -> bool:
        """Whether a layer of the trunk, counted from 0, is MoE."""
        if self.layers is not None:
            return layer in self.layers
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def capacity(self, tokens: int) -> int | None:
        """C for a micro-batch of T tokens."""
        if self.capacity_factor is None:
            return None
        exact = self.capacity_factor * tokens * self.num_experts_per_tok / self.n_routed_experts
        return math.ceil(round(exact, 6))


def within_capacity(experts: Tensor, capacity: int, n_experts: int, real: Tensor | None) -> Tensor:
    """Which assignments fit: experts (B, T, K) -> bool (B, T, K). Position by position, then rows, then the K choices;
    padding (real (B, T) false) takes no room and never fits."""
    if real is not None:
        experts = experts.masked_fill(~real.unsqueeze(-1), n_experts)
    by_position = experts.transpose(0, 1)
    flat = by_position.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=n_experts + 1)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(flat.numel(), device=flat.device) - first[flat[order]]
    fits = (rank < capacity) & (flat < n_experts)
    return fits.view(by_position.shape).transpose(0, 1)


class MoE(nn.Module):
    """x (B, T, D) -> (y (B, T, D), RoutingReport)."""

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.row_multiple = 1  # an expert's rows are filled up to a multiple of this in training (`dispatch.py`)
        self.gate = Router(
            hidden_size,
            config.n_routed_experts,
            config.num_experts_per_tok,
            scoring_func=config.scoring_func,
            norm_topk_prob=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            n_group=config.n_group,
            topk_group=config.topk_group,
            group_score="top2" if config.topk_method == "noaux_tc" else "max",
        )
        width = config.moe_intermediate_size
        self.experts = Experts(hidden_size, width, config.n_routed_experts, config.experts_implementation)
        self.shared_experts = (
            FeedForward(hidden_size, width * config.n_shared_experts) if config.n_shared_experts else None
        )

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, RoutingReport]:
        """real (B, T): false at padding, which is computed but neither counted nor given room."""
        rows, length, _ = x.shape
        flat = x.flatten(0, 1)
        if not self.training and self._kernels_take(flat):
            out, choice = self._quick(flat)
            return out.view_as(x), self._report(choice, choice.experts.new_zeros(()), (rows, length), real)
        choice = self.gate(flat)
        weights, dropped = choice.weights, choice.experts.new_zeros(())
        capacity = self.config.capacity(rows * length if real is None else int(real.sum())) if self.training else None
        if capacity is not None:
            experts = choice.experts.view(rows, length, -1)
            fits = within_capacity(experts, capacity, self.config.n_routed_experts, real).flatten(0, 1)
            weights = weights * fits
            lost = ~fits if real is None else ~fits & real.flatten().unsqueeze(-1)
            dropped = lost.sum()
        path = route(choice.experts, self.config.n_routed_experts, self.row_multiple if self.training else 1)
        out = bring_back(self.experts(send(flat, path), sort_weights(weights, path), path.rows), path)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        return out.view_as(x), self._report(choice, dropped, (rows, length), real)

    def _kernels_take(self, flat: Tensor) -> bool:
        """Whether the kernels are the faster way for tokens (n, D)."""
        return self.experts.takes(flat, self.config.num_experts_per_tok) and kernels.alike((self.gate.weight, None))

    def _quick(self, flat: Tensor) -> tuple[Tensor, Choice]:
        """The experts by the compiled kernel, and the shared ones too where they have few rows."""
        gate, (gate_up, down), beside = self.gate, self.experts.kept, self.shared_experts
        few = beside is not None and beside.takes(flat, flat.shape[0]) and kernels.alike(down, *beside.kept)
        shared = beside.kept if beside is not None and few else None
        out, told = kernels.mixture(
            flat, gate.weight, gate.e_score_correction_bias, gate.choosing, gate_up, down, shared
        )  # fmt: skip
        return out if beside is None or few else out.add_(beside(flat)), Choice(*told)

    def _report(self, choice: Choice, dropped: Tensor, shape: tuple[int, int], real: Tensor | None) -> RoutingReport:
        config, k = self.config, self.config.num_experts_per_tok
        chosen, weights, scores, logits = (part.view(*shape, -1) for part in choice)
        loss = scores.new_zeros(())
        if self.training:
            balance = config.balance
            if isinstance(balance, LossFree) and balance.sequence_loss:
                loss = loss + balance.sequence_loss * balance_loss(scores, k, real, per_sequence=True)
            elif isinstance(balance, SequenceLoss | BatchLoss):
                per_sequence = isinstance(balance, SequenceLoss)
                loss = loss + balance.coefficient * balance_loss(scores, k, real, per_sequence)
            if config.router_z_loss:
                loss = loss + config.router_z_loss * z_loss(logits, real)
        return RoutingReport(self.layer, dropped, loss, chosen, weights.detach(), scores.detach(), real)
