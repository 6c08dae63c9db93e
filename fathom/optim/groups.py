"""Which weights are treated how.

    matrices   two and more dimensions: linear layers, the router, stacked experts
    tables     embedding and output head: matrices by shape, but a row is a token, not a direction
    vectors    norms and biases

Weight decay pulls matrices and tables towards 0 and leaves vectors alone: a norm's scale has nothing to gain from
being small (Brown et al. 2020 and after; the seed decayed everything, which at 0.01 makes no difference that can be
measured).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

TABLES = ("embed_tokens", "lm_head")
ROUTER = ".gate.weight"


@dataclass
class Groups:
    """Trainable weights by name, each tensor once however many names it has."""

    matrices: dict[str, Tensor] = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)


def split(model: nn.Module) -> Groups:
    """Sort a model's trainable weights. Raises TypeError for a weight that is not float32: it would have no master
    copy."""
    groups = Groups()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if weight.dtype != torch.float32:
            raise TypeError(
                f"{name} is {weight.dtype}; weights are trained in float32, and precision is autocast's affair"
            )
        parts = name.split(".")
        if weight.ndim < 2:
            groups.vectors[name] = weight
        elif any(table in parts for table in TABLES):
            groups.tables[name] = weight
        elif ("." + name).endswith(ROUTER):
            groups.routers[name] = weight
        else:
            groups.matrices[name] = weight
    return groups
