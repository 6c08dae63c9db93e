"""The router: which experts a token goes to, and with what weight.     DeepSeek-V2 report 2.2, DeepSeek-V3 report 2.1.2

    s   = softmax(W x)  or  sigmoid(W x)                                affinities, float32
    top = the K largest of s + b                                        b chooses and never weights
    g   = s[top] * scale,   divided by their sum first if norm_topk_prob

With groups, only topk_group of n_group groups of experts compete. A group's score is its largest affinity
(`group_limited_greedy`, V2) or the sum of its two largest s + b (`noaux_tc`, V3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.model.native.kernels import Choosing
from fathom.model.precision import widen


class Choice(NamedTuple):
    """experts (n, K) int64, weights (n, K) float32, scores (n, E) float32 without bias, logits (n, E) float32."""

    experts: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor


def choose(choice: Tensor, k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """Indices (n, K) of the K best of choice (n, E) = s + b, within the topk_group best groups.

    group_score: `max` or `top2`. Experts of other groups can never be chosen (-inf), whatever sign s + b has.
    """
    if n_group > 1:
        groups = choice.unflatten(-1, (n_group, -1))
        best = groups.amax(-1) if group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(-1, best.topk(topk_group, dim=-1, sorted=False).indices, True)
        choice = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    return choice.topk(k, dim=-1).indices


class Router(nn.Module):
    """x (n, D) -> Choice. The weight is (E, D) as in every DeepSeek checkpoint; the bias b is a float32 buffer."""

    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        n_experts: int,
        k: int,
        *,
        scoring_func: str,
        norm_topk_prob: bool,
        scale: float,
        n_group: int,
        topk_group: int,
        group_score: str,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(n_experts, dtype=torch.float32))
        self.k, self.scoring_func, self.norm_topk_prob, self.scale = k, scoring_func, norm_topk_prob, scale
        self.n_group, self.topk_group, self.group_score = n_group, topk_group, group_score

    def forward(self, x: Tensor) -> Choice:
        if not torch.is_autocast_enabled(x.device.type):
            return self._choice(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._choice(x)

    def _choice(self, x: Tensor) -> Choice:
        logits = torch.nn.functional.linear(widen(x), widen(self.weight))
        scores = logits.softmax(-1) if self.scoring_func == "softmax" else logits.sigmoid()
        biased = scores.detach() + self.e_score_correction_bias
        experts = choose(biased, self.k, self.n_group, self.topk_group, self.group_score)
        weights = scores.gather(-1, experts)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.scale != 1:
            weights = weights * self.scale
        return Choice(experts, weights, scores, logits)

    @property
    def choosing(self) -> Choosing:
        """The same knobs, as the kernels take them."""
        return Choosing(
            self.k, self.scoring_func == "sigmoid", self.norm_topk_prob, self.scale, self.n_group, self.topk_group,
            self.group_score == "top2",
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Keep the bias in float32 when the model is cast: in bfloat16 an update of 0.001 would be lost."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(self.e_score_correction_bias.device)
        return self
