"""Tokens as text, for log-probabilities and routing: every token has a spelling of its own.

A token whose bytes are no whole text is spelled as OpenAI's completions do, `bytes:\\xe2\\x80`, so that two such tokens
stay apart; a special token by its name; an id that the tokenizer lacks (padding of V) as `token_id:50300`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fathom.generate.request import LayerRouting, Score, TokenOutput
from fathom.tokenizer.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no minus infinity; vLLM's stand-in
Top = Sequence[tuple[int, float]]


class Spelling:
    """ids: spell every token as token_id:17 instead."""

    def __init__(self, tokenizer: Tokenizer, ids: bool = False) -> None:
        self.tokenizer, self.ids = tokenizer, ids
        self.bytes = tokenizer.token_bytes
        self.text = lru_cache(maxsize=65536)(self._text)

    def _text(self, token: int) -> str:
        if self.ids or token >= len(self.bytes):
            return f"token_id:{token}"
        raw = self.bytes[token]
        if not raw:
            return self.tokenizer.backend.id_to_token(token) or f"token_id:{token}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def bytes_of(self, token: int) -> list[int]:
        """The bytes of text that a token stands for."""
        return list(self.bytes[token]) if token < len(self.bytes) else []

    # --- log-probabilities

    def legacy(self, tokens: Sequence[int], scores: Sequence[Score | None], offsets: Sequence[int]) -> dict[str, Any]:
        """OpenAI's shape for completions. scores: None where nothing stands before a token; offsets: where in the text
        each begins."""
        return {
            "tokens": [self.text(token) for token in tokens],
            "token_logprobs": [None if score is None else finite(score.logprob) for score in scores],
            "top_logprobs": [
                None if score is None else self._likeliest(token, score)
                for token, score in zip(tokens, scores, strict=True)
            ],
            "text_offset": list(offsets),
        }

    def _likeliest(self, token: int, score: Score) -> dict[str, float]:
        """The likeliest, and the token itself, which need not be among them."""
        found = {self.text(each): finite(value) for each, value in score.top_logprobs}
        found.setdefault(self.text(token), finite(score.logprob))
        return found

    def chat(self, outputs: Sequence[TokenOutput]) -> dict[str, Any]:
        """OpenAI's shape for chats."""

        def one(token: int, logprob: float | None) -> dict[str, Any]:
            return {"token": self.text(token), "logprob": finite(logprob), "bytes": self.bytes_of(token)}

        content = [
            {**one(o.token, o.logprob), "top_logprobs": [one(*each) for each in o.top_logprobs]} for o in outputs
        ]
        return {"content": content, "refusal": None}

    def prompt(self, tokens: Sequence[int], scores: Sequence[Score | None], count: int) -> list[dict[str, Any] | None]:
        """vLLM's prompt_logprobs: a table for each token but the first, by token id. rank: 1 is the likeliest, null
        where it is not among the `count` that were asked for."""

        def table(token: int, score: Score | None) -> dict[str, Any] | None:
            if score is None:
                return None
            top = list(score.top_logprobs[:count])
            ranks = {each: rank for rank, (each, _) in enumerate(top, start=1)}
            if token not in ranks:
                top.append((token, score.logprob))
            return {
                str(each): {"logprob": finite(value), "rank": ranks.get(each), "decoded_token": self.text(each)}
                for each, value in top
            }

        return [table(token, score) for token, score in zip(tokens, scores, strict=True)]

    # --- routing

    def routing(self, outputs: Sequence[TokenOutput]) -> list[dict[str, Any]]:
        """Which experts each token went through."""
        return [
            {
                "token_id": o.token,
                "token": self.text(o.token),
                "draft": o.draft,
                "layers": [layer(each) for each in o.routing],
            }
            for o in outputs
        ]


def layer(routing: LayerRouting) -> dict[str, Any]:
    """One layer's experts and their weights."""
    return {"layer": routing.layer, "experts": routing.experts, "weights": [round(w, 6) for w in routing.weights]}


def finite(logprob: float | None) -> float:
    """A number that JSON has."""
    return LEAST if logprob is None else max(logprob, LEAST)
