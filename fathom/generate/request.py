"""Request: the currency of serving. What is asked for, and what comes back a token at a time.

Every option means what it means in vLLM and in OpenAI's API; what cannot be honoured is refused, in words.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from fathom.errors import RequestError

GREEDY_BELOW = 1e-5  # temperatures under it mean 0, as in vLLM: dividing by them would overflow
FinishReason = Literal["stop", "length"]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _within(value: Any, low: float, high: float = math.inf) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    )


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda v: v is None or _whole(v, 1), "1 or more, or None for as many as the window holds"),
    "min_tokens": (lambda v: _whole(v, 0), "a whole number, 0 or more"),
    "temperature": (lambda v: _within(v, 0), "a number, 0 (greedy) or more"),
    "top_k": (lambda v: v is None or _whole(v, 1), "1 or more, or None for all tokens"),
    "top_p": (lambda v: _within(v, 0, 1) and v > 0, "above 0 and at most 1"),
    "min_p": (lambda v: _within(v, 0, 1), "between 0 and 1"),
    "repetition_penalty": (lambda v: _within(v, 0) and v > 0, "a number above 0 (1: none)"),
    "presence_penalty": (lambda v: _within(v, -2, 2), "between -2 and 2"),
    "frequency_penalty": (lambda v: _within(v, -2, 2), "between -2 and 2"),
    "seed": (lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool)), "a whole number, or None"),
    "stop": (lambda v: all(isinstance(s, str) and s for s in v), "texts that are not empty"),
    "stop_token_ids": (lambda v: all(_whole(i, 0) for i in v), "token ids"),
    "logit_bias": (
        lambda v: all(_whole(i, 0) and _within(b, -100, 100) for i, b in v.items()),
        "token ids with numbers between -100 and 100",
    ),
    "logprobs": (lambda v: v is None or _whole(v, 0), "how many, 0 or more, or None for none"),
    "prompt_logprobs": (lambda v: v is None or _whole(v, 0), "how many, 0 or more, or None for none"),
    "ignore_eos": (lambda v: isinstance(v, bool), "true or false"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop. RequestError names every option that is impossible.

    max_tokens          at most so many tokens; None: as many as the window holds
    min_tokens          what would end the answer is barred until so many tokens are there
    temperature         divides the logits; 0 is greedy
    top_k, top_p, min_p only the k likeliest; the fewest likeliest that make up the probability p; those at least min_p
                        times as likely as the likeliest. In this order (see sampling.py)
    repetition_penalty  over prompt and output: logits above 0 are divided by it, others multiplied
    presence_penalty    taken from the logit of each token that the output has
    frequency_penalty   the same, times how often the output has it
    seed                same seed, same text; None: a new one each time
    stop                texts that end the answer and are not part of it, also across tokens
    stop_token_ids      tokens that end the answer, beside the end-of-text token
    logit_bias          token id -> number added to its logit
    logprobs            how many of the likeliest tokens are told beside the chosen one; None: no log-probabilities
    prompt_logprobs     the same for every token of the prompt but the first, which nothing stands before
    ignore_eos          go on after the end-of-text token
    """

    max_tokens: int | None = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value, kind in (
            ("stop", stop, Sequence),
            ("stop_token_ids", self.stop_token_ids, Sequence),
            ("logit_bias", self.logit_bias, Mapping),
        ):
            if not isinstance(value, kind) or isinstance(value, str):
                raise RequestError(f"{name} is {value!r}; possible are {_RULES[name][1]}")
            frozen = dict(value) if isinstance(value, Mapping) else tuple(value)
            object.__setattr__(self, name, frozen)
        wrong = [
            f"{name} is {_shown(getattr(self, name))}; possible: {possible}"
            for name, (right, possible) in _RULES.items()
            if not right(getattr(self, name))
        ]
        if not wrong and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            wrong.append(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}")
        if wrong:
            raise RequestError("\n".join(wrong))

    @property
    def greedy(self) -> bool:
        """The likeliest token each time, and no chance in it."""
        return self.temperature < GREEDY_BELOW

    @cached_property
    def without_logprobs(self) -> SamplingParams:
        """The same choice, told without probabilities."""
        return self if self.logprobs is None else replace(self, logprobs=None)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingParams:
        """The same from a mapping; RequestError names an unknown option and the nearest known one."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"possible are {', '.join(known)}"
                raise RequestError(f"There is no sampling option {name!r}; {hint}")
        return cls(**options)


def _shown(value: Any) -> str:
    return repr(dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value)


@dataclass(frozen=True)
class Request:
    """prompt_ids: what to continue, at least one token; id: the caller's own name for it; routing: tell which experts
    each token of the answer came through."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    id: str = ""
    routing: bool = False

    def check(self, vocab_size: int, window: int) -> None:
        """RequestError if a model of this vocabulary and window (max_position_embeddings) cannot honour it: prompt and
        answer together have at most `window` tokens."""
        if not self.prompt_ids:
            raise RequestError("The prompt has no tokens; give at least one.")
        if len(self.prompt_ids) >= window:
            raise RequestError(
                f"The prompt has {len(self.prompt_ids)} tokens, but the model's window holds {window}, the answer "
                f"included; shorten the prompt to at most {window - 1} tokens."
            )
        for name, ids in (
            ("The prompt", self.prompt_ids),
            ("stop_token_ids", self.params.stop_token_ids),
            ("logit_bias", self.params.logit_bias),
        ):
            beyond = [i for i in ids if not 0 <= i < vocab_size]
            if beyond:
                raise RequestError(f"{name} has the token {beyond[0]}; the model's tokens are 0 to {vocab_size - 1}.")


@dataclass(frozen=True)
class LayerRouting:
    """Where one MoE layer sent one token: the chosen experts and the weights of their outputs, heaviest first."""

    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Score:
    """What the model thought of a token of the prompt; as `TokenOutput` has it."""

    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """One token of an answer.

    text           what became certain with it: perhaps nothing (half a character, the beginning of a stop text),
                   perhaps more than its own
    logprob        natural logarithm of its probability under the model itself, before any option; None if not asked
    top_logprobs   (token, logprob) of the likeliest, likeliest first
    finish_reason  set on the last token: `stop` (the end of text, a stop token or text) or `length`
    stop_reason    the stop text or token; None for the end of text
    draft          an MTP depth had proposed it, and the model agreed
    routing        of the pass that chose it (the place before it), a layer each; empty if not asked
    """

    token: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    draft: bool = False
    routing: tuple[LayerRouting, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer. drafted, accepted: tokens that speculation proposed, and those that were right; prompt_scores: of
    every token of the prompt, None for the first; None if not asked."""

    id: str
    prompt_ids: tuple[int, ...]
    tokens: tuple[TokenOutput, ...]
    drafted: int = 0
    accepted: int = 0
    prompt_scores: tuple[Score | None, ...] | None = None

    @property
    def text(self) -> str:
        """The answer, without the prompt and without what stopped it."""
        return "".join(token.text for token in self.tokens)

    @property
    def token_ids(self) -> list[int]:
        """Every token, with the one that ended the answer."""
        return [token.token for token in self.tokens]

    @property
    def finish_reason(self) -> FinishReason | None:
        """None: it was left before its end."""
        return self.tokens[-1].finish_reason if self.tokens else None

    @property
    def stop_reason(self) -> str | int | None:
        """The stop text or token that ended it."""
        return self.tokens[-1].stop_reason if self.tokens else None
