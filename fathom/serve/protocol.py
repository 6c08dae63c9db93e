"""The only place where wire becomes `Request`: bodies -> prompts, tokens and sampling, or a refusal by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fathom.errors import RequestError, TokenizerError
from fathom.generate.request import Request, SamplingParams
from fathom.serve.bodies import ChatBody, CompletionBody, GenerateBody, MessageBody, Sampling
from fathom.serve.chat import ChatTemplate
from fathom.serve.failures import bad
from fathom.tokenizer.chat import Message
from fathom.tokenizer.tokenizer import Tokenizer

MAX_TOKENS = 16  # OpenAI's default for completions
ROLES = {"developer": "system"}


@dataclass(frozen=True)
class Bounds:
    """What a request must fit in.

    window      tokens of prompt and answer together
    vocabulary  V
    prompt      tokens of a prompt; output: of an answer; choices: prompts times n. None: no bound of the server's own
    """

    window: int
    vocabulary: int
    prompt: int | None = None
    output: int | None = None
    choices: int = 128

    @property
    def ceiling(self) -> int:
        """Tokens that an answer can have at all."""
        return self.window if self.output is None else min(self.output, self.window)


@dataclass(frozen=True)
class Asked:
    """Requests, n to a prompt, and what an answer has to be told about.

    texts     the prompts as texts, one a prompt; for echo
    silent    the answer's only token is not shown: max_tokens is 0
    """

    requests: tuple[Request, ...]
    texts: tuple[str, ...] = ()
    n: int = 1
    silent: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each once."""
        return sum(len(request.prompt_ids) for request in self.requests[:: self.n])


class Asker:
    """Bodies -> requests, for one model. special: whether texts get the tokenizer's own special tokens by default."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatTemplate, bounds: Bounds, special: bool = False) -> None:
        self.tokenizer, self.chat, self.bounds, self.special = tokenizer, chat, bounds, special

    # --- bodies

    def completion(self, body: CompletionBody, id: str) -> Asked:
        """ApiError: a field that cannot be honoured with this model."""
        n = body.n or 1
        if body.best_of not in (None, 1, n):
            said = f"best_of is {body.best_of}; possible are 1 and n ({n}): no answer is made to be thrown away"
            raise bad(said, "best_of", "unsupported_parameter")
        _common(body)
        special = self.special if body.add_special_tokens is None else body.add_special_tokens
        most = self._length(body.max_tokens, "max_tokens", max(MAX_TOKENS, body.min_tokens or 0))
        params = self._params(body, most, logprobs=body.logprobs, echoed=body.logprobs if body.echo else None)
        ids, texts = list[list[int]](), list[str]()
        for prompt in _many(body.prompt):
            whole = self._tokens(prompt, special)
            kept = self._fitted(whole, body.truncate_prompt_tokens, "prompt")
            ids.append(kept)
            if body.echo:
                same = isinstance(prompt, str) and len(kept) == len(whole)
                texts.append(prompt if same and isinstance(prompt, str) else self.tokenizer.decode(kept))
        return self._asked(ids, params, body, id, body.max_tokens == 0, texts)

    def conversation(self, body: ChatBody, id: str) -> Asked:
        """ApiError: as `completion`."""
        if body.top_logprobs and not body.logprobs:
            raise bad("top_logprobs is given and logprobs is not true", "top_logprobs")
        both = body.max_tokens, body.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise bad(f"max_tokens is {both[0]} and max_completion_tokens {both[1]}; give one", "max_completion_tokens")
        _common(body)
        field = "max_tokens" if both[1] is None else "max_completion_tokens"
        length = both[0] if both[1] is None else both[1]
        ids = self.messages(body.messages, body.add_generation_prompt)
        told = (body.top_logprobs or 0) if body.logprobs else None
        params = self._params(body, self._length(length, field, None), logprobs=told, stops=self.chat.stops)
        return self._asked([self._fitted(ids, body.truncate_prompt_tokens, "messages")], params, body, id, length == 0)

    def plain(self, body: GenerateBody, id: str) -> Asked:
        """ApiError: as `completion`. The defaults are those that the page of the seed began with."""
        ids = self._fitted(self._tokens(body.prompt, self.special), None, "prompt")
        most = self._length(body.max_length, "max_length", 200)
        params = SamplingParams(
            max_tokens=most,
            temperature=0.7 if body.temperature is None else body.temperature,
            top_p=0.9 if body.top_p is None else body.top_p,
            top_k=(50 if body.top_k is None else body.top_k) or None,
            seed=body.seed,
        )
        return Asked((Request(tuple(ids), params, id),))

    # --- prompts

    def text(self, text: str, special: bool, param: str = "prompt") -> list[int]:
        """The tokens of a text. One that is nothing but the name of the end of text (OpenAI's default prompt) or of the
        beginning is that token; elsewhere in a text such names are text. ApiError: it has a word that the tokenizer has
        no token for."""
        if text == self.tokenizer.eos:
            return [self.tokenizer.eos_id]
        if text == self.tokenizer.bos and self.tokenizer.bos_id is not None:
            return [self.tokenizer.bos_id]
        try:
            plain = self.tokenizer.encode(text)
        except TokenizerError as error:
            raise bad(str(error), param) from None
        return self.tokenizer.backend.encode(text, add_special_tokens=True).ids if special else plain

    def messages(self, messages: Sequence[MessageBody], add_generation_prompt: bool | None) -> list[int]:
        """The tokens of a conversation. ApiError: the template refuses it."""
        said: list[Message] = [{"role": ROLES.get(m.role, m.role), "content": m.text} for m in messages]
        try:
            return self.chat.encode(said, add_generation_prompt is not False)
        except (RequestError, TokenizerError) as error:
            raise bad(str(error), "messages") from None

    def _tokens(self, prompt: str | list[int], special: bool) -> list[int]:
        """A prompt without any begins after an end-of-text token, as documents do."""
        ids = self.text(prompt, special) if isinstance(prompt, str) else prompt
        return ids or [self.tokenizer.eos_id]

    def _fitted(self, ids: list[int], keep: int | None, param: str) -> list[int]:
        """Cut as was asked, and checked."""
        bounds = self.bounds
        if keep:
            ids = ids[-(bounds.window - 1 if keep == -1 else keep) :]
        beyond = next((i for i in ids if i >= bounds.vocabulary), None)
        if beyond is not None:
            raise bad(f"{param} has the token {beyond}; the model's tokens are 0 to {bounds.vocabulary - 1}", param)
        if len(ids) >= bounds.window:
            raise bad(
                f"This model's maximum context length is {bounds.window} tokens, the answer included, and the prompt "
                f"has {len(ids)}; shorten it to at most {bounds.window - 1}.", param, "context_length_exceeded",
            )  # fmt: skip
        if bounds.prompt is not None and len(ids) > bounds.prompt:
            raise bad(f"The prompt has {len(ids)} tokens; this server takes at most {bounds.prompt}.", param,
                      "context_length_exceeded")  # fmt: skip
        return ids

    # --- sampling

    def _length(self, asked: int | None, param: str, default: int | None) -> int | None:
        """max_tokens, within the server's own bound. One token is made even if none is shown."""
        most = self.bounds.output
        if asked is None:
            return default if most is None or (default is not None and default < most) else most
        if most is not None and asked > most:
            raise bad(f"{param} is {asked}; this server gives at most {most} tokens", param)
        return max(asked, 1)

    def _params(
        self, body: Sampling, most: int | None, logprobs: int | None, *,
        echoed: int | None = None, stops: tuple[str, ...] = (),
    ) -> SamplingParams:  # fmt: skip
        least, ceiling = body.min_tokens or 0, min(self.bounds.ceiling, self.bounds.ceiling if most is None else most)
        if least > ceiling:
            raise bad(f"min_tokens is {least}, more than the {ceiling} tokens that there may be at most", "min_tokens")
        own = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        for name, ids in (("logit_bias", bias), ("stop_token_ids", body.stop_token_ids or ())):
            beyond = next((i for i in ids if i >= self.bounds.vocabulary), None)
            if beyond is not None:
                raise bad(f"{name} has the token {beyond}; the model's are 0 to {self.bounds.vocabulary - 1}", name)
        asked = [count for count in (body.prompt_logprobs, echoed) if count is not None]
        return SamplingParams(
            max_tokens=most,
            min_tokens=least,
            temperature=_or(body.temperature, 1.0),
            top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
            top_p=_or(body.top_p, 1.0),
            min_p=_or(body.min_p, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            seed=body.seed,
            stop=tuple(dict.fromkeys((*own, *stops))),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logit_bias=bias,
            logprobs=logprobs,
            prompt_logprobs=max(asked) if asked else None,
            ignore_eos=bool(body.ignore_eos),
        )

    def _asked(
        self, prompts: list[list[int]], params: SamplingParams, body: Sampling, id: str, silent: bool,
        texts: Sequence[str] = (),
    ) -> Asked:  # fmt: skip
        n = body.n or 1
        if len(prompts) * n > self.bounds.choices:
            raise bad(f"{len(prompts)} prompts times n {n} are more than {self.bounds.choices} answers", "n")
        each = [params, *(_reseeded(params, i) for i in range(1, n))]
        routing = bool(body.return_routing)
        requests = tuple(Request(tuple(ids), one, id, routing) for ids in prompts for one in each)
        return Asked(requests, tuple(texts), n, silent)


def _common(body: Sampling) -> None:
    """What fields say about each other."""
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options is given and stream is not true", "stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise bad("prompt_logprobs is not told in streams; set stream to false", "prompt_logprobs")


def _reseeded(params: SamplingParams, i: int) -> SamplingParams:
    """The i-th of n choices: the same seed gives the same n texts, each another."""
    return params if params.seed is None else replace(params, seed=params.seed + i)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _many(prompt: Any) -> list[str | list[int]]:
    """Every shape of a prompt as a list of prompts."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    return [prompt] if isinstance(prompt[0], int) else prompt
