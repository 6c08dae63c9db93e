"""Every initial weight, on one page.

    | weights                                             | drawn from                                          |
    |-----------------------------------------------------|-----------------------------------------------------|
    | embedding, head, projections, experts               | N(0, s),  s = initializer_range                     |
    | output projections of a layer (o_proj, down_proj)   | N(0, s / sqrt(2 L)) with depth_aware_init (GPT-2)   |
    | router                                              | N(0, router_initializer_range, or s)                |
    | norms                                               | 1                                                   |
    | selection bias                                      | 0                                                   |
    | gate of the n-gram memory                           | 0, and 1 for the longest context                    |

Each tensor has a generator of its own, seeded by (seed, its name): a weight does not depend on which other parts the
model has, so that two runs that differ in one part start alike everywhere else.
"""

from __future__ import annotations

import hashlib

import torch

from fathom.model.transformer import Transformer

OUTPUTS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


def standard_deviation(model: Transformer, name: str) -> float:
    """The s of a weight matrix, by its name."""
    config = model.config
    if name.endswith("mlp.gate.weight") and config.moe is not None and config.moe.router_initializer_range:
        return config.moe.router_initializer_range
    if name.endswith(OUTPUTS) and config.depth_aware_init:
        return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
    return config.initializer_range


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter and buffer as the table says. Drawn on the CPU in float32, so that the device and dtype do
    not matter."""
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.empty(weight.shape, dtype=torch.float32)
        drawn.normal_(0.0, standard_deviation(model, name), generator=generator)
        weight.copy_(drawn)
    for layer in model.moe_layers().values():
        layer.gate.e_score_correction_bias.zero_()
    if model.memory is not None:
        model.memory.reset_gate()
