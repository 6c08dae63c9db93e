"""What one reading of some tokens gave: hidden states, and where the MoE layers sent each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.generate.request import LayerRouting, Score
from fathom.model.moe.balance import RoutingReport


@dataclass(frozen=True)
class Passage:
    """hidden (B, T, D) after the final norm; reports: one a MoE layer, of the same B rows and T places."""

    hidden: Tensor
    reports: tuple[RoutingReport, ...]

    def routing(self, row: int, place: int) -> tuple[LayerRouting, ...]:
        """Where one token went, heaviest expert first."""
        found = []
        for report in self.reports:
            weights, order = report.weights[row, place].sort(descending=True, stable=True)
            experts = report.experts[row, place][order]
            found.append(LayerRouting(report.layer, tuple(experts.tolist()), tuple(weights.tolist())))
        return tuple(found)


def scores(logits: Tensor, tokens: Sequence[int], count: int) -> list[Score]:
    """How likely each of T tokens was: logits (T, V) of the places before them; count: how many of the likeliest."""
    known = logits.float().log_softmax(-1)
    own = known.gather(-1, torch.tensor(tokens, device=known.device).unsqueeze(-1)).squeeze(-1).tolist()
    values, ids = (found.tolist() for found in known.topk(min(count, known.shape[-1])))
    rows = zip(own, ids, values, strict=True)
    return [Score(logprob, tuple(zip(i, v, strict=True))) for logprob, i, v in rows]
