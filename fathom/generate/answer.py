"""Answer: a request and what it has got so far. Decides about text and about the end; knows no model.

The reference loop, the speculative one and the serving engine hand it chosen tokens and pass on what it gives.
"""

from __future__ import annotations

import secrets

from fathom.generate.request import Completion, FinishReason, LayerRouting, Request, Score, TokenOutput
from fathom.generate.sampling import Choice, Turn
from fathom.tokenizer.tokenizer import Tokenizer


class Answer:
    """Tokens in, text out. window: how many tokens prompt and answer may have together.

    drafted, accepted are counted by whoever speculates; scores, of the prompt, are set by whoever reads it.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, window: int) -> None:
        params = request.params
        self.request, self.outputs = request, list[TokenOutput]()
        self.drafted = self.accepted = 0
        self.scores: list[Score | None] | None = None
        space = window - len(request.prompt_ids)
        self.room = space if params.max_tokens is None else min(params.max_tokens, space)
        self._eos = None if params.ignore_eos else tokenizer.eos_id
        ends = set(params.stop_token_ids) | ({self._eos} if self._eos is not None else set())
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._ids: list[int] = []
        self._turn = Turn(params, self._seed, request.prompt_ids, self._ids, frozenset(ends))
        self._decoder = tokenizer.stream()
        self._held = ""  # the end of the text so far, if a stop text begins so

    @property
    def turn(self) -> Turn:
        """What sampling needs to know; its output grows with the answer."""
        return self._turn

    @property
    def left(self) -> int:
        """How many more tokens there may be; 0 once it is finished."""
        return 0 if self.finished else self.room - len(self._ids)

    @property
    def finished(self) -> bool:
        """Whether the last token has come."""
        return bool(self.outputs) and self.outputs[-1].finish_reason is not None

    def take(self, choice: Choice, routing: tuple[LayerRouting, ...] = (), draft: bool = False) -> TokenOutput:
        """Add a token; routing and draft are passed on."""
        if self.finished:
            raise ValueError("the answer has ended; no token can follow")
        self._ids.append(choice.token)
        ended, full = choice.token in self._turn.ends, len(self._ids) == self.room
        fresh = "" if ended else self._decoder.push(choice.token)
        if ended or full:
            fresh += self._decoder.finish()
        text, stopped = self._release(fresh, last=ended or full)
        reason: FinishReason | None = "stop" if ended or stopped is not None else "length" if full else None
        by = stopped if stopped is not None or not ended or choice.token == self._eos else choice.token
        output = TokenOutput(choice.token, text, choice.logprob, choice.top_logprobs, reason, by, draft, routing)
        self.outputs.append(output)
        return output

    def _release(self, fresh: str, last: bool) -> tuple[str, str | None]:
        """The text that is certain now, and the stop text that was met. As in vLLM, the text of the first min_tokens
        tokens is not searched."""
        stops = self.request.params.stop
        if not stops or len(self._ids) <= self.request.params.min_tokens:
            return fresh, None
        text = self._held + fresh
        met = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
        if met:
            at, stop = min(met, key=lambda pair: pair[0])
            return text[:at], stop
        keep = 0 if last else max(_overlap(text, stop) for stop in stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def completion(self) -> Completion:
        """Everything so far."""
        scores = None if self.scores is None else tuple(self.scores)
        prompt, outputs = self.request.prompt_ids, tuple(self.outputs)
        return Completion(self.request.id, prompt, outputs, self.drafted, self.accepted, scores)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of text that stop begins with, short of the whole of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
