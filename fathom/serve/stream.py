"""Answers on their way out: what the engine tells -> OpenAI's objects, whole or as server-sent events.

A part is what one choice adds; the whole answer is one part, a stream many. Dictionaries are written as they stand:
this runs for every token of every stream, so nothing is validated here (tests hold it to `answers.py`). Where only the
text differs from one chunk to the next, the bytes around it are kept (`quick`, whose slow twin is `part`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from fathom.generate.request import Completion, Request, Score, TokenOutput
from fathom.serve.engine import End
from fathom.serve.exchange import News
from fathom.serve.failures import ApiError, busy
from fathom.serve.protocol import Asked
from fathom.serve.spelling import Spelling

DONE = b"data: [DONE]\n\n"
PLACE = "\0text\0"  # stands for a chunk's text while the bytes around it are made
Object = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What an answer is to tell.

    logprobs         of the answer's tokens
    echo             begin with the prompt; echoed: and tell so many likeliest tokens of each of its places
    prompt_logprobs  vLLM's table with so many
    usage            in a stream: at its end; continuous: in every chunk
    """

    logprobs: bool = False
    echo: bool = False
    echoed: int | None = None
    prompt_logprobs: int | None = None
    routing: bool = False
    token_ids: bool = False
    usage: bool = False
    continuous: bool = False

    @property
    def plain(self) -> bool:
        """Whether a chunk in the middle of a stream tells its text alone."""
        return not (self.logprobs or self.routing or self.token_ids or self.continuous)


@dataclass
class Choice:
    """One answer so far.

    text    the prompt, where it is echoed
    told    characters that went out; held: tokens that wait for the end
    tokens  of the answer
    begun   a chunk of it went out
    around  the bytes before and after the text of a chunk that tells nothing else
    """

    index: int
    request: Request
    text: str = ""
    told: int = 0
    tokens: int = 0
    begun: bool = False
    around: tuple[bytes, bytes] | None = None
    held: list[TokenOutput] = field(default_factory=list)
    end: End | None = None


@dataclass
class Answers:
    """All choices of a request, and what they cost."""

    asked: Asked
    choices: list[Choice] = field(init=False)

    def __post_init__(self) -> None:
        texts = self.asked.texts
        self.choices = [
            Choice(i, request, texts[i // self.asked.n] if texts else "")
            for i, request in enumerate(self.asked.requests)
        ]

    def shown(self, outputs: Sequence[TokenOutput]) -> Sequence[TokenOutput]:
        """What may be seen of the answer's tokens."""
        return () if self.asked.silent else outputs

    @property
    def completion_tokens(self) -> int:
        """Of all answers that was told so far."""
        return sum(choice.tokens for choice in self.choices)

    def completion_tokens_of_ends(self) -> int:
        """Of the answers that have ended, told or not."""
        ends = [choice.end for choice in self.choices if choice.end is not None]
        return 0 if self.asked.silent else sum(len(end.completion.tokens) for end in ends)

    def usage(self) -> Object:
        """Tokens so far."""
        prompt, answer = self.asked.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def whole_usage(self) -> Object:
        """The same once all have ended. What n answers share of a prompt was cached by the first: it does not count."""
        ends = [choice.end for choice in self.choices if choice.end is not None]
        accepted = sum(end.completion.accepted for end in ends)
        cached = sum(end.cached_tokens for end in ends[:: self.asked.n])
        rejected = sum(end.completion.drafted for end in ends) - accepted
        return {
            **self.usage(),
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": rejected,
            },
        }


def failure(end: End) -> ApiError | None:
    """Why an answer is none; None if it is one."""
    if end.why == "deadline":
        told = len(end.completion.tokens)
        return ApiError(504, f"The deadline passed; the answer had {told} tokens by then.", code="deadline_exceeded")
    if end.why == "cancelled":
        return busy("The server is shutting down and gave the answer up.", "shutting_down", 5)
    if end.why == "failed":
        return ApiError(500, "The engine failed; the server's log says how.", code="engine_failed")
    return None


class Style:
    """How one kind of answer looks. id, created, model and fingerprint stand in every object."""

    object = whole_object = ""

    def __init__(self, id: str, model: str, fingerprint: str, spelling: Spelling, wish: Wish, answers: Answers) -> None:
        self.id, self.model, self.fingerprint = id, model, fingerprint
        self.spelling, self.wish, self.answers = spelling, wish, answers
        self.created = int(time.time())

    def envelope(self, object: str, choices: list[Object], **more: Any) -> Object:
        """An object around choices."""
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }

    # --- one choice

    def part(self, choice: Choice, outputs: Sequence[TokenOutput], end: End | None) -> Object | None:
        """What outputs add to a choice; None where a chunk would tell nothing."""
        raise NotImplementedError

    def count(self, choice: Choice, outputs: Sequence[TokenOutput], end: End | None) -> Sequence[TokenOutput]:
        """Note what came; what may be seen of it."""
        outputs = self.answers.shown(outputs)
        choice.tokens += len(outputs)
        if end is not None:
            choice.end = end
        return outputs

    def finished(self, end: End | None) -> Object:
        """How a choice ended."""
        if end is None:
            return {"finish_reason": None, "stop_reason": None}
        if self.answers.asked.silent:
            return {"finish_reason": "length", "stop_reason": None}
        return {"finish_reason": end.why, "stop_reason": end.completion.stop_reason}

    def extras(self, outputs: Sequence[TokenOutput]) -> Object:
        """Token ids and routing, if asked for."""
        more: Object = {}
        if self.wish.token_ids:
            more["token_ids"] = [o.token for o in outputs]
        if self.wish.routing:
            more["routing"] = self.spelling.routing(outputs)
        return more

    # --- all of them

    def whole(self) -> Object:
        """The complete answer; every choice has its end."""
        choices = [self.part(choice, choice.end.completion.tokens, choice.end) for choice in self.ended()]
        return self.envelope(self.whole_object, [c for c in choices if c], usage=self.answers.whole_usage())

    def ended(self) -> Iterator[Any]:
        """The choices, all of which must have ended."""
        for choice in self.answers.choices:
            assert choice.end is not None, f"choice {choice.index} has not ended"
            yield choice

    def chunk(self, choice: Choice, part: Object) -> bytes:
        """A part as an event."""
        if self.wish.continuous:
            return event(self.envelope(self.object, [part], usage=self.answers.usage()))
        if self.wish.usage:
            return event(self.envelope(self.object, [part], usage=None))
        return event(self.envelope(self.object, [part]))

    def chunks(self, news: News) -> bytes:
        """Events for everything that became known; ApiError: an answer failed. Progress of the same choice that came
        together is told together."""
        if len(news) == 1 and self.wish.plain and not self.answers.asked.silent:
            (index, progress), choice = news[0], self.answers.choices[news[0][0]]
            if choice.begun and progress.end is None:
                return self.quick(choice, progress.outputs)
        found: dict[int, list[TokenOutput]] = {}
        ends: dict[int, End] = {}
        for index, progress in news:
            found.setdefault(index, []).extend(progress.outputs)
            if progress.end is not None:
                ends[index] = progress.end
        sent = b""
        for index, outputs in found.items():
            end, choice = ends.get(index), self.answers.choices[index]
            wrong = None if end is None else failure(end)
            if wrong is not None:
                raise wrong
            if self.late:
                choice.held += outputs
                outputs = choice.held
                if end is None:
                    continue
            part = self.part(choice, outputs, end)
            if part is not None:
                sent += self.first(choice) + self.chunk(choice, part)
                choice.begun = True
        return sent

    def quick(self, choice: Choice, outputs: Sequence[TokenOutput]) -> bytes:
        """A chunk in the middle of a plain stream."""
        choice.tokens += len(outputs)
        text = outputs[0].text if len(outputs) == 1 else "".join([o.text for o in outputs])
        if not text:
            return b""
        if choice.around is None:
            blank = self.part(Choice(choice.index, choice.request, begun=True), [TokenOutput(0, PLACE)], None)
            assert blank is not None
            before, _, after = self.chunk(choice, blank).partition(orjson.dumps(PLACE))
            choice.around = before, after
        before, after = choice.around
        return before + orjson.dumps(text) + after

    @property
    def late(self) -> bool:
        """Whether a stream has to wait for the end of an answer."""
        return False

    def first(self, choice: Choice) -> bytes:
        """What goes out before a choice's first chunk."""
        return b""

    def last(self) -> bytes:
        """The end of a stream."""
        if not self.wish.usage:
            return DONE
        return event(self.envelope(self.object, [], usage=self.answers.whole_usage())) + DONE


class CompletionStyle(Style):
    """/v1/completions."""

    object = whole_object = "text_completion"

    @property
    def late(self) -> bool:
        """The prompt comes first, and its log-probabilities are known at the end."""
        return self.wish.echoed is not None

    def part(self, choice: Choice, outputs: Sequence[TokenOutput], end: End | None) -> Object | None:
        outputs = self.count(choice, outputs, end)
        wish, begins, at = self.wish, not choice.begun, choice.told
        text = "".join([o.text for o in outputs])
        if begins and wish.echo:
            text = choice.text + text
        choice.told += len(text)
        if not text and end is None and not (outputs and (wish.logprobs or wish.routing or wish.token_ids)):
            return None
        part: Object = {"index": choice.index, "text": text, "logprobs": None, **self.finished(end)}
        if wish.logprobs:
            part["logprobs"] = self._logprobs(choice, outputs, at, end if begins else None)
        if wish.token_ids and begins:
            part["prompt_token_ids"] = choice.request.prompt_ids
        if wish.prompt_logprobs is not None and end is not None:
            scores = end.completion.prompt_scores or ()
            part["prompt_logprobs"] = self.spelling.prompt(choice.request.prompt_ids, scores, wish.prompt_logprobs)
        return {**part, **self.extras(outputs)} if wish.routing or wish.token_ids else part

    def _logprobs(self, choice: Choice, outputs: Sequence[TokenOutput], at: int, end: End | None) -> Object:
        tokens, scores, offsets = list[int](), list["Score | None"](), list[int]()
        if end is not None and self.wish.echo:
            tokens += choice.request.prompt_ids
            scores += self._echoed(end.completion)
            offsets += self._offsets(choice.request.prompt_ids)
            at = len(choice.text)
        for output in outputs:
            tokens.append(output.token)
            scores.append(Score(output.logprob or 0.0, output.top_logprobs))
            offsets.append(at)
            at += len(output.text)
        return self.spelling.legacy(tokens, scores, offsets)

    def _echoed(self, completion: Completion) -> Iterator[Score | None]:
        for score in completion.prompt_scores or ():
            yield None if score is None else Score(score.logprob, score.top_logprobs[: self.wish.echoed])

    def _offsets(self, tokens: Sequence[int]) -> Iterator[int]:
        """Where each token of the prompt begins in its text."""
        decoder, at = self.spelling.tokenizer.stream(), 0
        for token in tokens:
            yield at
            at += len(decoder.push(token))


class ChatStyle(Style):
    """/v1/chat/completions."""

    object, whole_object = "chat.completion.chunk", "chat.completion"

    def part(self, choice: Choice, outputs: Sequence[TokenOutput], end: End | None) -> Object | None:
        outputs = self.count(choice, outputs, end)
        wish, text = self.wish, "".join([o.text for o in outputs])
        if not text and end is None and not (outputs and (wish.logprobs or wish.routing or wish.token_ids)):
            return None
        part: Object = {"index": choice.index, "delta": {"content": text} if text else {}, "logprobs": None}
        if wish.logprobs:
            part["logprobs"] = self.spelling.chat(outputs)
        part |= self.finished(end)
        return {**part, **self.extras(outputs)} if wish.routing or wish.token_ids else part

    def first(self, choice: Choice) -> bytes:
        if choice.begun:
            return b""
        delta = {"role": "assistant", "content": ""}
        part = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}
        return self.chunk(choice, part)

    def whole(self) -> Object:
        answer = super().whole()
        for choice in answer["choices"]:
            content = choice.pop("delta").get("content", "")
            choice["message"] = {"role": "assistant", "content": content, "refusal": None}
        request, first = self.answers.asked.requests[0], self.answers.choices[0]
        if self.wish.token_ids:
            answer["prompt_token_ids"] = request.prompt_ids
        if self.wish.prompt_logprobs is not None and first.end is not None:
            scores = first.end.completion.prompt_scores or ()
            answer["prompt_logprobs"] = self.spelling.prompt(request.prompt_ids, scores, self.wish.prompt_logprobs)
        return answer


def event(body: Object) -> bytes:
    """A server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"
