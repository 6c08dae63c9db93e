"""Speculation with the model's own MTP depths: they draft, one pass of the trunk verifies, nothing is lost.

                                                     DeepSeek-V3 report 5.4.3; Leviathan et al. 2023, Chen et al. 2023

    draft    q_k = the distribution of MTP depth k for the k-th token from here,   d_k drawn from q_k
    verify   p_1 .. p_m+1 = the main model's, from one pass over  t_n d_1 .. d_m
    accept   d_k if u < p_k(d_k) / q_k(d_k),   else end with a token drawn from  max(p_k - q_k, 0)
    bonus    all accepted: one more token, drawn from p_m+1

The tokens are distributed as without speculation; greedy ones are the same. p and q are what is left after penalties,
temperature and cuts, so every option of a request holds.

Depth k at place i reads h^k-1_i and the token t_i+k, and has a cache of its own. With t_n the last token known and
h_n-1 the last hidden state, depth k runs over the places after its cache's end up to n - 1, the last of which read
drafts. Afterwards only what read true tokens stays: places up to n - k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.errors import RequestError
from fathom.generate.answer import Answer
from fathom.generate.cache import Cache
from fathom.generate.generator import PREFILL_CHUNK, Generator
from fathom.generate.request import TokenOutput
from fathom.generate.sampling import Choice, Turn, adjust, choose, distribution, draw, tell, uniform
from fathom.model.transformer import Transformer
from fathom.tokenizer.tokenizer import Tokenizer


class Draft(NamedTuple):
    """A proposed token, and the probabilities q (V) float64 it was drawn from; None when greedy."""

    token: int
    q: Tensor | None


def probabilities(logits: Tensor, turn: Turn) -> Tensor:
    """What a token of a turn is drawn from: logits (V) -> (V) float64, summing to 1; not for greedy requests."""
    weights = distribution(adjust(logits, turn), turn.params)
    return weights / weights.sum()


def propose(logits: Tensor, turn: Turn) -> Draft:
    """A draft for the place after turn.output; logits (V) of an MTP depth."""
    if turn.params.greedy:
        return Draft(int(adjust(logits, turn).argmax()), None)
    q = probabilities(logits, turn)
    return Draft(draw(q, uniform(turn.seed, "draft", len(turn.output))), q)


def verify(logits: Tensor, draft: Draft, turn: Turn) -> tuple[Choice, bool]:
    """The token for the place after turn.output, and whether it is the draft; logits (V) of the main model."""
    if draft.q is None:
        choice = choose(logits, turn)
        return choice, choice.token == draft.token
    place, p = len(turn.output), probabilities(logits, turn)
    if uniform(turn.seed, "accept", place) * draft.q[draft.token] < p[draft.token]:
        return tell(logits, draft.token, turn.params), True
    rest = (p - draft.q).clamp(min=0)
    if not rest.any():  # p = q but for rounding
        rest = p
    return tell(logits, draw(rest, uniform(turn.seed, "sampling", place)), turn.params), False


class SpeculativeGenerator(Generator):
    """`Generator`, with as many drafts a pass as the model has MTP depths. RequestError: it has none.

    Counts what was drafted and accepted in the answer.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, prefill_chunk: int = PREFILL_CHUNK) -> None:
        super().__init__(model, tokenizer, prefill_chunk=prefill_chunk)
        if not len(model.mtp):
            raise RequestError(
                "Speculation needs a model with MTP depths, and model.mtp.num_nextn_predict_layers of this one is 0; "
                "generate without it."
            )

    def run(self, answer: Answer) -> Iterator[TokenOutput]:
        prompt, capacity = answer.request.prompt_ids, len(answer.request.prompt_ids) + answer.room
        caches = self.caches(len(self.model.layers), capacity)
        hidden = self.read(prompt, caches)
        drafter = Drafter(self, capacity)
        drafter.see(hidden)
        output = answer.take(choose(self.logits(hidden[0, -1]), answer.turn))
        yield output
        while not answer.finished:
            drafts = drafter.drafts(answer)
            base = caches[0].length
            hidden = self.read([output.token, *(d.token for d in drafts)], caches)
            kept = 0
            for output in self._judged(answer, drafts, self.logits(hidden[0])):
                kept += 1
                yield output
            for cache in caches:
                cache.rewind(base + kept)
            drafter.see(hidden[:, :kept])

    def _judged(self, answer: Answer, drafts: Sequence[Draft], logits: Tensor) -> Iterator[TokenOutput]:
        """Take accepted drafts and the token after them; logits (m + 1, V) of the pass over m drafts."""
        answer.drafted += len(drafts)
        for draft, row in zip(drafts, logits[:-1], strict=True):
            choice, accepted = verify(row, draft, answer.turn)
            answer.accepted += accepted
            yield answer.take(choice)
            if not accepted or answer.finished:
                return
        yield answer.take(choose(logits[-1], answer.turn))


class Drafter:
    """The MTP depths of one answer: a cache each, and the hidden states h^0 .. h^D-1 of all places, (1, S, D) each.

    seen: how many places have h^0; the token at place `seen` is known too when drafts are asked for.
    """

    def __init__(self, generator: Generator, capacity: int) -> None:
        self.generator, self.model = generator, generator.model
        self.caches: list[Cache] = generator.caches(len(self.model.mtp), capacity)
        self.states: list[Tensor | None] = [None] * len(self.caches)
        self.capacity, self.seen = capacity, 0

    def see(self, hidden: Tensor) -> None:
        """Hidden states (1, T, D) of the trunk at the places after those seen."""
        self._keep(0, self.seen, hidden)
        self.seen += hidden.shape[1]

    def _keep(self, depth: int, place: int, hidden: Tensor) -> None:
        state = self.states[depth]
        if state is None:
            state = self.states[depth] = hidden.new_empty(1, self.capacity, hidden.shape[-1])
        state[:, place : place + hidden.shape[1]] = hidden

    @torch.inference_mode()
    def drafts(self, answer: Answer) -> list[Draft]:
        """Proposals for the tokens after the last one, as many as there are depths and room for beside the token that
        every pass gives."""
        turn = answer.turn
        tokens, output = [*turn.prompt, *turn.output], list(turn.output)
        found: list[Draft] = []
        for depth in range(1, min(len(self.caches), answer.left - 1) + 1):
            logits = self._look(depth, tokens)
            draft = propose(logits, turn._replace(output=output))
            found.append(draft)
            tokens.append(draft.token)
            output.append(draft.token)
        for depth, cache in enumerate(self.caches, start=1):
            cache.rewind(min(cache.length, max(0, self.seen - depth + 1)))  # the others have read drafts
        return found

    def _look(self, depth: int, tokens: Sequence[int]) -> Tensor:
        """Run a depth over all places that it has not read yet; logits (V) at the last."""
        cache, before, device = self.caches[depth - 1], self.states[depth - 1], self.model.embed_tokens.weight.device
        assert before is not None
        start, chunk = cache.length, self.generator.prefill_chunk
        hidden = before[:, start:start]
        for first in range(start, self.seen, chunk):
            last = min(first + chunk, self.seen)
            ahead = torch.tensor([tokens[first + depth : last + depth]], device=device)
            places = torch.arange(first, last, device=device).unsqueeze(0)
            hidden, _ = self.model.look_ahead(depth, before[:, first:last], ahead, places, None, cache)
            if depth < len(self.states):
                self._keep(depth, first, hidden)
        return self.model.logits(hidden[0, -1])
