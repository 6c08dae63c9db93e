"""What a pass tells about tokens beside the next one: where the MoE layers sent them, and how likely they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.generate.request import LayerRouting, Score
from fathom.model.transformer import Trunk


def routing_at(trunk: Trunk, row: int, place: int) -> tuple[LayerRouting, ...]:
    """Where one token of a pass went, heaviest expert first."""
    found = []
    for report in trunk.routing:
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
