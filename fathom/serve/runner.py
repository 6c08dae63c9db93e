"""Passes over the model: shares of a step in, chosen tokens out.

A pass is a rectangle of rows. One new token each (and drafts) makes one pass; parts of prompts are grouped by length,
so that little of a pass is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.generate.passage import scores
from fathom.generate.sampling import Choice, choose_batch
from fathom.model.transformer import Transformer, Trunk
from fathom.serve.drafting import Drafter
from fathom.serve.paged_cache import Pages
from fathom.serve.recorded import Record, Recordings
from fathom.serve.scheduler import Share

PADDING = 0.25  # the largest part of a pass over prompts that may be padding


class Step(NamedTuple):
    """What a share gave. choices: after its last token and after each draft; drafts: the tokens proposed; passage, row,
    place: where the first choice was made."""

    share: Share
    choices: list[Choice]
    drafts: list[int]
    passage: Trunk
    row: int
    place: int


class Runner:
    """Runs a model over the blocks of a cache. drafter: None without MTP depths. record: how passes of one token a row
    are recorded (`recorded.py`); None: they are not. experts: tokens that each expert has had since the start, (E) by
    layer, padding left out."""

    def __init__(self, model: Transformer, pages: Pages, drafter: Drafter | None, record: Record | None = None) -> None:
        self.model, self.pages, self.drafter = model, pages, drafter
        self.device = model.embed_tokens.weight.device
        self.layers = range(len(model.layers))
        self.recordings = None if record is None else Recordings(model, pages, self.layers, record)
        self.reach = model.memory.reach if model.memory else 0
        self.experts: dict[int, Tensor] = {}
        self._loads: Tensor | None = None  # the same as one

    @torch.inference_mode()
    def run(self, shares: Sequence[Share]) -> list[Step]:
        """Compute all shares; a step of each that reached the end of its text."""
        steps: list[Step] = []
        short = [share for share in shares if share.decoding]
        if short:
            drafts = self._drafts(short)
            steps += self._choose(short, drafts, self._pass(short, drafts))
        for group in _groups([share for share in shares if not share.decoding]):
            passage = self._pass(group, {})
            self._score(group, passage)
            steps += self._choose(group, {}, passage)
        return steps

    def _drafts(self, shares: Sequence[Share]) -> dict[int, list[int]]:
        """Proposals by ticket."""
        some = [share for share in shares if share.drafts]
        if not some or self.drafter is None:
            return {}
        found = self.drafter.propose([share.sequence for share in some], [share.drafts for share in some])
        return {share.sequence.ticket: drafts for share, drafts in zip(some, found, strict=True)}

    def _pass(self, shares: Sequence[Share], drafts: dict[int, list[int]]) -> Trunk:
        """One pass over the shares, a row each, with their drafts."""
        texts = [[*s.sequence.tokens(s.start, s.start + s.count), *drafts.get(s.sequence.ticket, ())] for s in shares]
        starts, counts = [share.start for share in shares], [len(text) for text in texts]
        past = [s.sequence.tokens(max(0, s.start - self.reach), s.start) for s in shares] if self.reach else ()
        batch = self.pages.rows([share.sequence.blocks for share in shares], starts, counts, past)
        passage = self.recordings.run(batch, texts) if self.recordings else None
        if passage is None:
            caches = self.pages.view(self.layers, batch)
            passage = self.model.trunk(batch.tokens(texts), batch.places, caches=caches, real=batch.real)
        self._count(passage)
        return passage

    def _count(self, passage: Trunk) -> None:
        """Add up the choices of all layers at once."""
        reports = passage.routing
        if not reports:
            return
        layers, experts = len(reports), reports[0].scores.shape[-1]
        chosen = torch.stack([report.experts for report in reports])
        if reports[0].real is not None:
            chosen = chosen[:, reports[0].real]
        place = torch.arange(0, layers * experts, experts, device=self.device).unsqueeze(-1) + chosen.flatten(1)
        counts = torch.bincount(place.flatten(), minlength=layers * experts).view(layers, experts)
        if self._loads is None:
            self._loads = counts
            self.experts = {report.layer: load for report, load in zip(reports, counts, strict=True)}
        else:
            self._loads.add_(counts)

    def _choose(self, shares: Sequence[Share], drafts: dict[int, list[int]], passage: Trunk) -> list[Step]:
        """The tokens after the last of each share that reached the end of its text, and after each of its drafts."""
        ready = [(row, share, drafts.get(share.sequence.ticket, [])) for row, share in enumerate(shares)]
        ready = [(row, share, mine) for row, share, mine in ready if share.reaches_end]
        if not ready:
            return []
        turns, at = [], []
        for row, share, mine in ready:
            turn = share.sequence.answer.turn
            for n in range(len(mine) + 1):
                turns.append(turn._replace(output=[*turn.output, *mine[:n]]) if n else turn)
                at.append((row, share.count - 1 + n))
        index = torch.tensor(at, device=self.device)
        hidden = passage.hidden[index[:, 0], index[:, 1]]
        choices = iter(choose_batch(self.model.logits(hidden), turns))
        return [
            Step(share, list(islice(choices, len(mine) + 1)), mine, passage, row, share.count - 1)
            for row, share, mine in ready
        ]

    def _score(self, shares: Sequence[Share], passage: Trunk) -> None:
        """Fill in how likely the tokens of prompts were, where that was asked; hand hidden states to the drafter."""
        for row, share in enumerate(shares):
            answer, start = share.sequence.answer, share.start
            prompt, count = answer.request.prompt_ids, answer.request.params.prompt_logprobs
            if count is not None and not answer.turn.output:
                if start == 0:
                    answer.scores = [None]
                after = prompt[start + 1 : start + share.count + 1]
                assert answer.scores is not None
                answer.scores += scores(self.model.logits(passage.hidden[row, : len(after)]), after, count)
        drafting = [(row, share) for row, share in enumerate(shares) if share.sequence.drafts is not None]
        if self.drafter is not None and drafting:
            for row, share in drafting:
                share.sequence.drafts.see(passage.hidden[row, : share.count])
            self.drafter.catch_up([share.sequence for _, share in drafting])


def _groups(shares: Sequence[Share]) -> list[list[Share]]:
    """Shares of prompts whose lengths are near enough to be one pass."""
    groups: list[list[Share]] = []
    for share in sorted(shares, key=lambda s: -s.count):
        group = groups[-1] if groups else None
        if group is not None:
            area, full = group[0].count * (len(group) + 1), sum(s.count for s in group) + share.count
            if area - full <= PADDING * area:
                group.append(share)
                continue
        groups.append([share])
    return groups
