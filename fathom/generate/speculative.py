"""Speculation with the model's own MTP depths: they draft, one pass of the trunk verifies, nothing is lost.

                                                     DeepSeek-V3 report 5.4.3; Leviathan et al. 2023, Chen et al. 2023

    draft    d_k = choose(MTP depth k for the k-th token from here)
    verify   x_k = choose(main model),  k = 1 .. m + 1,  from one pass over  t_n d_1 .. d_m
    accept   x_1, x_2, ... up to and with the first that is not its draft; x_m+1 if all are

Every token is the one that the plain loop would have chosen, and not only drawn from the same distribution: `choose`
is a pure function of logits, options and (seed, place), and the draft of a place is chosen with the same chance u. So
speculation changes no text, whatever is drafted. (Rejection sampling accepts a little more at high temperatures and
gives other texts.)

Depth k at place i reads h^k-1_i and the token t_i+k, and has a cache of its own. With t_n the last token known and
h_n-1 the last hidden state, depth k runs over the places after its cache's end up to n - 1, the last of which read
drafts. Afterwards only what read true tokens stays: places up to n - k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fathom.errors import RequestError
from fathom.generate.answer import Answer
from fathom.generate.cache import Cache
from fathom.generate.generator import PREFILL_CHUNK, Generator
from fathom.generate.request import TokenOutput
from fathom.generate.sampling import Turn, choose
from fathom.model.transformer import Transformer, Trunk
from fathom.tokenizer.tokenizer import Tokenizer


def propose(logits: Tensor, turn: Turn) -> int:
    """A draft for the place after turn.output; logits (V) of an MTP depth."""
    return choose(logits, turn._replace(params=turn.params.without_logprobs)).token


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
        capacity = len(answer.request.prompt_ids) + answer.room
        caches = self.caches(len(self.model.layers), capacity)
        passages = self.begun(answer, caches)
        drafter = Drafter(self, capacity)
        for passage in passages:
            drafter.see(passage.hidden)
        choice = choose(self.logits(passages[-1].hidden[0, -1]), answer.turn)
        output = answer.take(choice, self.routing(answer, passages[-1], -1))
        yield output
        while not answer.finished:
            drafts = drafter.drafts(answer)
            base, kept = caches[0].length, 0
            passages = self.read([output.token, *drafts], caches)
            hidden = torch.cat([passage.hidden for passage in passages], 1)
            for output in self._judged(answer, drafts, passages, self.logits(hidden[0])):
                kept += 1
                yield output
            for cache in caches:
                cache.rewind(base + kept)
            drafter.see(hidden[:, :kept])

    def _judged(
        self, answer: Answer, drafts: Sequence[int], passages: Sequence[Trunk], logits: Tensor
    ) -> Iterator[TokenOutput]:
        """Take accepted drafts and the token after them; passages over the last token and m drafts, and their logits
        (m + 1, V)."""
        answer.drafted += len(drafts)
        places = [(passage, place) for passage in passages for place in range(passage.hidden.shape[1])]
        for (passage, place), row, draft in zip(places, logits, [*drafts, None], strict=True):
            choice = choose(row, answer.turn)
            accepted = choice.token == draft
            answer.accepted += accepted
            yield answer.take(choice, self.routing(answer, passage, place), accepted)
            if not accepted or answer.finished:
                return


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
    def drafts(self, answer: Answer) -> list[int]:
        """Proposals for the tokens after the last one, as many as there are depths and room for beside the token that
        every pass gives."""
        turn = answer.turn
        tokens, output = [*turn.prompt, *turn.output], list(turn.output)
        found: list[int] = []
        for depth in range(1, min(len(self.caches), answer.left - 1) + 1):
            logits = self._look(depth, tokens)
            draft = propose(logits, turn._replace(output=output))
            found.append(draft)
            tokens.append(draft)
            output.append(draft)
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
