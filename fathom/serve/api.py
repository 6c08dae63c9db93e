"""The HTTP API: OpenAI's routes, vLLM's extensions, the plain /generate, and what operators ask.

    create_app(service, config) -> FastAPI

A body is read and checked (`bodies`), made a request (`protocol`), handed to the engine (`exchange`) and answered as it
comes (`stream`). The event loop only ever waits: what takes long, such as tokenizing a long prompt, runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.requests import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from fathom.errors import RequestError
from fathom.serve import answers
from fathom.serve.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    Sampling,
    TokenizeChat,
    TokenizeText,
)
from fathom.serve.delivery import GONE, EventStream, watching
from fathom.serve.door import Door, Note, note_of
from fathom.serve.exchange import Call, Exchange
from fathom.serve.failures import STATUS_TEXT, ApiError, bad, busy
from fathom.serve.fields import Wire, read
from fathom.serve.intake import aside, body_of, has
from fathom.serve.limits import Keys, Rates
from fathom.serve.metrics import Meters
from fathom.serve.protocol import Asker, Bounds
from fathom.serve.schema import document, errors, events, takes
from fathom.serve.service import ServerConfig, Service
from fathom.serve.spelling import Spelling
from fathom.serve.stream import Answers, ChatStyle, CompletionStyle, Style, Wish, failure
from fathom.serve.worker import Closed, QueueFull
from fathom.version import __version__

W = TypeVar("W", bound=Wire)

TIMEOUT_HEADER = "x-request-timeout"
BODIES = (CompletionBody, ChatBody, GenerateBody, TokenizeText, TokenizeChat, DetokenizeBody)
UNKNOWN = (*BODIES, answers.ChatChunk)  # to FastAPI
TOLD_BYTES = 64  # a token of an answer, as `aside` counts


class Api:
    """The routes, and what they share."""

    def __init__(self, service: Service, config: ServerConfig) -> None:
        self.service, self.config = service, config
        self.bounds = Bounds(
            service.window, service.vocabulary, config.max_prompt_tokens, config.max_output_tokens, config.max_choices
        )
        self.asker = Asker(service.tokenizer, service.chat, self.bounds, service.special)
        self.spelling, self.id_spelling = Spelling(service.tokenizer), Spelling(service.tokenizer, ids=True)
        self.exchange = Exchange(service.worker)
        self.meters = Meters(self.exchange.worker.stats, service.names[0])
        self.exchange.ended = self.meters.ended
        self.rates = Rates(config.requests_per_minute, config.tokens_per_minute)
        details = service.details
        self.fingerprint = f"fathom-{__version__}-step{details.step}-{details.quantization or details.dtype}"

    # --- OpenAI's routes

    async def models(self, request: Request) -> Response:
        """The models that are served: one, under each of its names."""
        return json({"object": "list", "data": [self._model(name) for name in self.service.names]})

    async def model(self, request: Request, model: str) -> Response:
        """One model."""
        self._known(model)
        return json(self._model(model))

    async def completions(self, request: Request) -> Response:
        """Continue prompts. With `stream`, server-sent events: `data: {...}` chunks of the same shape, then
        `data: [DONE]`; an error after the first chunk comes as `data: {"error": ...}`."""
        body, size = await self._body(request, CompletionBody)
        name, note = self._known(body.model), note_of(request.scope)
        asked = await aside(size, self.asker.completion, body, note.id)
        wish = self._wish(
            body, logprobs=body.logprobs is not None, echo=bool(body.echo), echoed=body.logprobs if body.echo else None
        )
        id, found = f"cmpl-{note.id}", Answers(asked)
        style = CompletionStyle(id, name, self.fingerprint, self._spelling(body), wish, found)
        return await self._answer(request, style, bool(body.stream))

    async def conversation(self, request: Request) -> Response:
        """Answer a conversation. Streams as for completions, with chunks of the shape ChatChunk."""
        body, size = await self._body(request, ChatBody)
        name, note = self._known(body.model), note_of(request.scope)
        asked = await aside(size, self.asker.conversation, body, note.id)
        wish = self._wish(body, logprobs=bool(body.logprobs))
        id, found = f"chatcmpl-{note.id}", Answers(asked)
        style = ChatStyle(id, name, self.fingerprint, self._spelling(body), wish, found)
        return await self._answer(request, style, bool(body.stream))

    # --- ours

    async def generate(self, request: Request) -> Response:
        """Continue a prompt: the plain door."""
        body, size = await self._body(request, GenerateBody)
        asked = await aside(size, self.asker.plain, body, note_of(request.scope).id)
        found = Answers(asked)
        call = self._open(request, found, streaming=False)
        if not await self._ended(request, call, found):
            return Response(status_code=GONE)
        end = found.choices[0].end
        assert end is not None
        return json({"generated_text": end.completion.text})

    async def tokenize(self, request: Request) -> Response:
        """Text or messages -> token ids."""
        raw = await body_of(request, self.config.max_body, self.config.body_timeout)
        return json(await aside(len(raw), self._tokens, raw))

    def _tokens(self, raw: bytes) -> dict[str, Any]:
        body: TokenizeText | TokenizeChat
        if has(raw, "messages"):
            body = read(TokenizeChat, raw)
            self._known(body.model)
            tokens = self.asker.messages(body.messages, body.add_generation_prompt)
        else:
            body = read(TokenizeText, raw)
            self._known(body.model)
            special = self.service.special if body.add_special_tokens is None else body.add_special_tokens
            tokens = self.asker.text(body.prompt, special)
        strings = [self.spelling.text(token) for token in tokens] if body.return_token_strs else None
        return {"count": len(tokens), "max_model_len": self.service.window, "tokens": tokens, "token_strs": strings}

    async def detokenize(self, request: Request) -> Response:
        """Token ids -> text."""
        body, size = await self._body(request, DetokenizeBody)
        self._known(body.model)
        backend, known = self.service.tokenizer.backend, self.service.tokenizer.vocab_size
        beyond = next((token for token in body.tokens if token >= known), None)
        if beyond is not None:
            raise bad(f"tokens has {beyond}; the tokenizer's are 0 to {known - 1}", "tokens")
        text = await aside(size, lambda: backend.decode(body.tokens, skip_special_tokens=False))
        return json({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """What a client has to know to count tokens by itself (vLLM)."""
        tokenizer = self.service.tokenizer
        facts = answers.TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",
            vocab_size=tokenizer.vocab_size,
            model_max_length=self.service.window,
            eos_token=tokenizer.eos,
            bos_token=tokenizer.bos,
            pad_token=tokenizer.backend.id_to_token(tokenizer.pad_id) or tokenizer.eos,
            chat_template=self.service.chat.source,
        )
        return json(facts.model_dump())

    # --- for operators

    async def health(self, request: Request) -> Response:
        """Whether the process does its work; 503: the engine broke, and only a restart mends it."""
        failed = self.exchange.worker.failure
        return json({"status": "ok"}) if failed is None else json({"status": "failed", "reason": failed}, 503)

    async def ready(self, request: Request) -> Response:
        """Whether the model answers; 503 tells why not."""
        worker = self.exchange.worker
        reason = "the server is shutting down" if self.exchange.draining else worker.failure
        if reason is None and not worker.running:
            reason = "the engine does not run"
        return json({"status": "ready"}) if reason is None else json({"status": "not ready", "reason": reason}, 503)

    async def metrics(self, request: Request) -> Response:
        """Counters and times for Prometheus."""
        text, kind = await asyncio.to_thread(self.meters.text)
        return Response(text, headers={"content-type": kind})

    # --- bodies

    async def _body(self, request: Request, model: type[W]) -> tuple[W, int]:
        """The checked body, and its bytes."""
        raw = await body_of(request, self.config.max_body, self.config.body_timeout)
        return await aside(len(raw), read, model, raw), len(raw)

    def _known(self, name: str | None) -> str:
        """The name of a model. ApiError 404: there is none of it."""
        if name is None or name in self.service.names:
            return name or self.service.names[0]
        raise ApiError(404, f"The model {name[:200]!r} does not exist here; there is "
                       f"{', '.join(self.service.names)}.", param="model", code="model_not_found")  # fmt: skip

    def _model(self, name: str) -> dict[str, Any]:
        service = self.service
        facts = answers.Model(
            id=name,
            created=service.created,
            root=service.names[0],
            max_model_len=service.window,
            fathom=service.details,
        )
        return facts.model_dump()

    def _spelling(self, body: Sampling) -> Spelling:
        return self.id_spelling if body.return_tokens_as_token_ids else self.spelling

    def _wish(self, body: Sampling, **more: Any) -> Wish:
        options = body.stream_options
        usage = bool(options and options.include_usage)
        return Wish(
            prompt_logprobs=body.prompt_logprobs,
            routing=bool(body.return_routing),
            token_ids=bool(body.return_token_ids),
            usage=usage,
            continuous=usage and bool(options and options.continuous_usage_stats),
            **more,
        )

    # --- answers

    def _open(self, request: Request, found: Answers, streaming: bool) -> Call:
        """ApiError: 400, 429, 503."""
        note = note_of(request.scope)
        seconds = min(self.config.timeout, asked_timeout(request.headers))
        try:
            deadline = time.monotonic() + seconds
            call = self.exchange.open(found.asked.requests, streaming=streaming, deadline=deadline)
        except RequestError as error:
            raise bad(str(error)) from None
        except QueueFull as full:
            self.meters.refused.inc()
            raise busy("The server is busy; its queue is full.", "queue_full", full.retry_after, 429) from None
        except Closed:
            if self.exchange.worker.failure is not None:
                raise busy("The engine broke; the server waits for its restart.", "engine_failed", 30) from None
            raise busy("The server is shutting down.", "shutting_down", 5) from None
        note.prompt_tokens = found.asked.prompt_tokens
        self.rates.spend(note.caller, note.prompt_tokens)
        return call

    async def _answer(self, request: Request, style: Style, streaming: bool) -> Response:
        found = style.answers
        call = self._open(request, found, streaming)
        if streaming:
            return await self._stream(request, call, style)
        if not await self._ended(request, call, found):
            return Response(status_code=GONE)
        told = found.completion_tokens_of_ends() + (found.asked.prompt_tokens if style.wish.echo else 0)
        content = await aside(told * TOLD_BYTES, lambda: orjson.dumps(style.whole()))
        return Response(content, media_type="application/json")

    async def _ended(self, request: Request, call: Call, found: Answers) -> bool:
        """Wait for the end of every choice; false: the client hung up. ApiError: 500, 503, 504."""
        watch = watching(request.receive, call)
        try:
            while news := await call.news():
                for index, progress in news:
                    if progress.end is not None:
                        found.choices[index].end = progress.end
                        wrong = failure(progress.end)
                        if wrong is not None:
                            raise wrong
            return not call.gone
        finally:
            watch.cancel()
            call.cancel()
            self._settle(note_of(request.scope), found, call.gone)

    async def _stream(self, request: Request, call: Call, style: Style) -> Response:
        """The response begins with the first news, so that what fails before it has a status of its own."""
        watch = watching(request.receive, call)

        def settle() -> None:
            watch.cancel()
            call.cancel()
            self._settle(note_of(request.scope), style.answers, call.gone)

        try:
            first = style.chunks(await call.news())
        except BaseException:
            settle()
            raise
        return EventStream(call, style, first, settle)

    def _settle(self, note: Note, found: Answers, gone: bool) -> None:
        """Once an answer is over, one way or the other: what it cost."""
        ends = [choice.end for choice in found.choices if choice.end is not None]
        tokens = max(found.completion_tokens, found.completion_tokens_of_ends())
        note.completion_tokens = tokens
        self.rates.spend(note.caller, tokens)
        times = [end.timing.first_token for end in ends if end.timing.first_token is not None]
        note.first_token = min(times) if times else None
        note.finish = "disconnected" if gone else ",".join(dict.fromkeys(end.why for end in ends)) or None


def asked_timeout(headers: Mapping[str, str]) -> float:
    """Seconds that the caller gives. ApiError: no number above 0."""
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return float("inf")
    with contextlib.suppress(ValueError):
        seconds = float(given)
        if seconds > 0:
            return seconds
    raise bad(f"{TIMEOUT_HEADER} is {given[:40]!r}; possible are seconds, above 0", TIMEOUT_HEADER)


def json(content: Any, status: int = 200) -> Response:
    """An object as a response."""
    return Response(orjson.dumps(content), status, media_type="application/json")


# --- the app

DESCRIPTION = """OpenAI's API for a model that Fathom trained, with vLLM's extensions.

Every response has the header `x-request-id`: the caller's own, if it is at most 128 of `A-Za-z0-9._:-`, or a new one.
Fields that are not known, or that are known and not honoured, are refused by name; null means that a field was left
out.

The header `x-request-timeout` (seconds, at most the server's own) says after which time a request is given up: with
504, or in a stream that has begun with an error as its last event.
"""


def create_app(service: Service, config: ServerConfig | None = None) -> FastAPI:
    """The app. `app.state.api` is its `Api`; the engine's thread starts and stops with the app's lifespan."""
    settings = config or ServerConfig()
    api = Api(service, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        api.exchange.start()
        try:
            yield
        finally:
            api.exchange.draining = True
            await asyncio.to_thread(api.exchange.worker.stop, 0.0)

    quiet: dict[str, Any] = {"telemetry": {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}}
    app = FastAPI(
        title="Fathom", version=__version__, description=DESCRIPTION, lifespan=lifespan,
        docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, **quiet,
    )  # fmt: skip
    app.state.api = api
    keys = Keys(settings.api_keys)
    add_routes(app, api)
    app.add_exception_handler(ApiError, told)
    app.add_exception_handler(HTTPException, wrong_url)
    app.add_middleware(Door, keys=keys, rates=api.rates, meters=api.meters)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    written: dict[str, Any] = {}

    async def openapi(request: Request) -> Response:
        if not written:
            written.update(document(app, UNKNOWN, api.bounds, bool(len(keys))))
        return json(written)

    app.add_api_route("/openapi.json", openapi, methods=["GET"], include_in_schema=False)
    return app


def add_routes(app: FastAPI, api: Api) -> None:
    """Every path, with its answers."""
    asked = errors(400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
    light = errors(400, 401, 404, 408, 413, 415, 429, 500)

    def post(path: str, call: Any, model: Any, *bodies: type[Wire], engine: bool = False, chunk: Any = None) -> None:
        responses = {**(asked if engine else light), **(events(chunk) if chunk is not None else {})}
        app.add_api_route(
            path, call, methods=["POST"], response_model=model, responses=responses, openapi_extra=takes(*bodies)
        )

    def get(path: str, call: Any, model: Any, *statuses: int, **more: Any) -> None:
        responses = {**errors(*statuses), **more.pop("responses", {})}
        app.add_api_route(path, call, methods=["GET"], response_model=model, responses=responses, **more)

    get("/v1/models", api.models, answers.Models, 401)
    get("/v1/models/{model:path}", api.model, answers.Model, 401, 404)
    post("/v1/completions", api.completions, answers.Completion, CompletionBody, engine=True, chunk=answers.Completion)
    post(
        "/v1/chat/completions", api.conversation, answers.ChatCompletion, ChatBody, engine=True, chunk=answers.ChatChunk
    )
    post("/generate", api.generate, answers.Generated, GenerateBody, engine=True)
    post("/tokenize", api.tokenize, answers.Tokens, TokenizeText, TokenizeChat)
    post("/detokenize", api.detokenize, answers.Detokenized, DetokenizeBody)
    get("/tokenizer_info", api.tokenizer_info, answers.TokenizerInfo, 401)
    unwell: dict[int | str, dict[str, Any]] = {503: {"model": answers.Health, "description": "The engine broke."}}
    get("/health", api.health, answers.Health, responses=unwell)
    unready: dict[int | str, dict[str, Any]] = {503: {"model": answers.Ready, "description": "It does not answer."}}
    get("/ready", api.ready, answers.Ready, responses=unready)
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    get("/metrics", api.metrics, None, 401, responses=text, response_class=Response)


async def told(request: Request, error: Exception) -> Response:
    """An ApiError as a response."""
    assert isinstance(error, ApiError)
    return Response(error.content, error.status, error.headers, media_type="application/json")


async def wrong_url(request: Request, error: Exception) -> Response:
    """404 and 405, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        wrong = ApiError(405, f"There is no {asked}; {STATUS_TEXT[405]}", code="method_not_allowed",
                         headers=error.headers)  # fmt: skip
    elif error.status_code == 404:
        wrong = ApiError(404, f"There is no {asked}; GET /openapi.json lists what there is.", code="unknown_url")
    else:
        wrong = ApiError(error.status_code, str(error.detail), code="http_error", headers=error.headers)
    return await told(request, wrong)
