"""The reference loop: the prompt once, then a token at a time. One request after another, clarity first: it is the slow
twin that the serving engine is tested against.

    h = trunk(prompt);   repeat:  t = choose(head h_last);   h = trunk(t)          with a cache a layer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fathom.errors import RequestError
from fathom.generate.answer import Answer
from fathom.generate.cache import Cache, caches_for
from fathom.generate.passage import routing_at, scores
from fathom.generate.request import Completion, LayerRouting, Request, SamplingParams, TokenOutput
from fathom.generate.sampling import choose
from fathom.model.precision import compute_dtype
from fathom.model.transformer import Transformer, Trunk
from fathom.tokenizer.tokenizer import Tokenizer

PREFILL_CHUNK = 512


class Generator:
    """Continues prompts with a model that is in eval mode.

    prefill_chunk: how many tokens of a prompt are read at once, which bounds memory; the text does not depend on it.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, prefill_chunk: int = PREFILL_CHUNK) -> None:
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {prefill_chunk}; a chunk has at least one token")
        self.model, self.tokenizer, self.prefill_chunk = model, tokenizer, prefill_chunk

    def request(self, prompt: str, params: SamplingParams | None = None, id: str = "") -> Request:
        """A text as a request. An empty one begins after an end-of-text token, as every document does in training.
        RequestError: it holds half of a surrogate pair, which is what a terminal makes of bytes that are not UTF-8."""
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise RequestError("The prompt is not text: it has bytes that are not UTF-8.") from None
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]
        return Request(tuple(ids), params or SamplingParams(), id)

    def begin(self, request: Request) -> Answer:
        """An answer without tokens. RequestError for what the model cannot honour."""
        if self.model.training:
            raise ValueError("the model is in training mode; call model.eval() before generating")
        config = self.model.config
        request.check(self.model.embed_tokens.num_embeddings, config.max_position_embeddings)
        return Answer(request, self.tokenizer, config.max_position_embeddings)

    def run(self, answer: Answer) -> Iterator[TokenOutput]:
        """Fill an answer, token by token, until it is finished or the caller stops asking."""
        prompt = answer.request.prompt_ids
        caches = self.caches(len(self.model.layers), len(prompt) + answer.room)
        passage = self.begun(answer, caches)[-1]
        while True:
            choice = choose(self.logits(passage.hidden[0, -1]), answer.turn)
            output = answer.take(choice, self.routing(answer, passage, -1))
            yield output
            if answer.finished:
                return
            passage = self.read([output.token], caches)[-1]

    def begun(self, answer: Answer, caches: Sequence[Cache]) -> list[Trunk]:
        """The prompt read, in chunks, and scored if that was asked."""
        prompt, count = answer.request.prompt_ids, answer.request.params.prompt_logprobs
        passages = self.read(prompt, caches)
        if count is not None:
            answer.scores, place = [None], 1
            for passage in passages:
                hidden = passage.hidden[0, : len(prompt) - place]
                after = prompt[place : place + hidden.shape[0]]
                answer.scores += scores(self.logits(hidden), after, count)
                place += len(after)
        return passages

    @staticmethod
    def routing(answer: Answer, passage: Trunk, place: int) -> tuple[LayerRouting, ...]:
        """Of a place, if it was asked."""
        return routing_at(passage, 0, place) if answer.request.routing else ()

    def stream(self, request: Request) -> Iterator[TokenOutput]:
        """The answer as it comes."""
        return self.run(self.begin(request))

    def complete(self, request: Request) -> Completion:
        """The whole answer."""
        answer = self.begin(request)
        for _ in self.run(answer):
            pass
        return answer.completion()

    def complete_all(self, requests: Iterable[Request]) -> list[Completion]:
        """One after another, all checked before the first begins."""
        answers = [self.begin(request) for request in requests]
        for answer in answers:
            for _ in self.run(answer):
                pass
        return [answer.completion() for answer in answers]

    # --- the model

    def caches(self, layers: int, capacity: int) -> list[Cache]:
        """Empty caches for one row, in the dtype that matrices are multiplied in."""
        weight = self.model.embed_tokens.weight
        return caches_for(self.model.config, layers, 1, capacity, compute_dtype(weight), weight.device)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], caches: Sequence[Cache]) -> list[Trunk]:
        """Run the trunk over new tokens (T), in chunks."""
        row = torch.tensor(tokens, device=self.model.embed_tokens.weight.device).unsqueeze(0)
        return [self.model.trunk(part, caches=caches) for part in row.split(self.prefill_chunk, 1)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V)."""
        return self.model.logits(hidden)
