"""Engines over tiny models, and what they give when all is done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "generate"))

from tiny_text import eager_to_please, letters, ready

from fathom.generate.request import Request
from fathom.serve.engine import End, Engine

__all__ = ["eager_to_please", "finish", "letters", "ready"]


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
