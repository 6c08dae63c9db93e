"""Engines over tiny models, and what they give when all is done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "generate"))

from tiny_text import letters, ready

from fathom.generate.request import Request
from fathom.model.transformer import Transformer
from fathom.serve.engine import End, Engine

__all__ = ["eager_to_please", "finish", "letters", "ready"]


def eager_to_please(depths: int) -> Transformer:
    """A model whose MTP depths are often right."""
    model = ready("mla_low_rank", "v3", depths, tie_word_embeddings=True)
    with torch.no_grad():
        for layer in (*model.layers, *(m.block for m in model.mtp)):
            layer.self_attn.o_proj.weight.mul_(0.1)
        for mtp in model.mtp:
            mtp.eh_proj.weight.copy_(torch.cat((torch.eye(20), torch.zeros(20, 20)), 1))
        model.embed_tokens.weight.mul_(2)
    return model


def finish(engine: Engine, requests: Sequence[Request]) -> list[End]:
    """Add all and step until the engine is idle; the ends in order of the requests. What was said step by step is the
    completion."""
    tickets = [engine.add(request) for request in requests]
    ends: dict[int, End] = {}
    said: dict[int, list[int]] = {}
    while engine.has_work:
        for progress in engine.step():
            said.setdefault(progress.ticket, []).extend(output.token for output in progress.outputs)
            if progress.end is not None:
                ends[progress.ticket] = progress.end
    for ticket, end in ends.items():
        assert said.get(ticket, []) == end.completion.token_ids
    return [ends[ticket] for ticket in tickets]
