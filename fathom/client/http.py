"""The API from outside: a small typed client on httpx.

    async with Api(ApiConfig(url="http://127.0.0.1:5000")) as api:
        model = (await api.models())[0]
        async for piece in api.complete("The state of", Sampling(seed=1), model):
            print(piece.text, end="")

An answer is always streamed. Leaving the loop, or cancelling the task that it runs in, closes the connection, and the
server stops making tokens. Whatever goes wrong is an `ApiError` with words for a person.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from httpx_sse import EventSource, SSEError
from pydantic import Field, ValidationError

from fathom.client.wire import Chunk, Model, Models, Piece, Problem, Told
from fathom.errors import ConfigError, UserError
from fathom.knobs import Knobs
from fathom.version import __version__


class ApiError(UserError):
    """Something stands between the page and an answer.

    status        of the HTTP answer; None if there was none
    retry_after   seconds after which the server wants to be asked again; None if it did not say
    code          the server's word for programs, such as context_length_exceeded
    """

    def __init__(
        self, message: str, status: int | None = None, retry_after: int | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after, self.code = status, retry_after, code


class Away(ApiError):
    """Nothing answers there, or something that is not this API."""


class KeyRefused(ApiError):
    """The key is missing, wrong, or not allowed to do this."""


class Busy(ApiError):
    """The server is full, or the key has used up its share: later."""


class Refused(ApiError):
    """The request cannot be honoured as it is."""


class Failed(ApiError):
    """The server broke."""


class Broken(ApiError):
    """The stream ended before the answer did; what came before it stays."""


class ApiConfig(Knobs):
    """Where the API is."""

    url: str = "http://127.0.0.1:5000"
    """Without /v1."""
    key: str | None = None
    """Sent as `Authorization: Bearer KEY`."""
    connect: float = Field(default=5.0, gt=0)
    """Seconds to wait for a connection, and for short answers."""
    patience: float = Field(default=300.0, gt=0)
    """Seconds to wait for the next token: a request may stand in the server's queue."""


class Sampling(Knobs):
    """How tokens are chosen; the page's controls."""

    max_length: int = Field(default=128, ge=1)
    """New tokens, at most."""
    temperature: float = Field(default=0.7, ge=0)
    """0: the likeliest token each time."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=50, ge=0)
    """0: all tokens."""
    seed: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """As the API has it. Options that change nothing are left out: other servers may not know top_k."""
        body: dict[str, Any] = {"max_tokens": self.max_length, "temperature": self.temperature, "top_p": self.top_p}
        if self.top_k:
            body["top_k"] = self.top_k
        return body if self.seed is None else body | {"seed": self.seed}


def address(url: str) -> str:
    """The address without /v1 and a slash at its end. ConfigError: it is none."""
    whole = url if "://" in url else f"http://{url}"
    try:
        parsed = httpx.URL(whole)
        right = parsed.scheme in ("http", "https") and bool(parsed.host) and not parsed.query
    except httpx.InvalidURL:
        right = False
    if not right:
        raise ConfigError(f"--api {url} is no address of an API; possible is, for example, http://127.0.0.1:5000")
    return whole.rstrip("/").removesuffix("/v1").rstrip("/")


class Api:
    """The API at one address. Its connections are kept; close it, or use it as `async with`."""

    def __init__(self, config: ApiConfig = ApiConfig()) -> None:  # noqa: B008 - frozen
        whole = httpx.URL(address(config.url))
        self.config, self.url = config, str(whole.copy_with(userinfo=b"")).rstrip("/")  # pages show it: no passwords
        headers = {"user-agent": f"fathom-client/{__version__}"}
        if config.key:
            if not (config.key.isascii() and config.key.isprintable()):
                raise ConfigError("The API key has characters that no HTTP header can carry; keys are plain ASCII.")
            headers["authorization"] = f"Bearer {config.key}"
        self._http = httpx.AsyncClient(
            base_url=whole,
            headers=headers,
            timeout=httpx.Timeout(config.patience, connect=config.connect, pool=config.connect, write=config.connect),
            # a hundred pages may stream at once, and each asks now and then whether the server is there
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            trust_env=not nearby(whole.host),
        )

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # --- questions

    async def models(self) -> tuple[Model, ...]:
        """What is served. ApiError; Away also where an answer is not this API's."""
        response = await self._get("/v1/models")
        if response.status_code >= 300:
            raise refusal(response.status_code, response.content, response.headers, self.url)
        try:
            return Models.model_validate_json(response.content).data
        except ValidationError:
            raise self._foreign("GET /v1/models") from None

    async def waiting(self) -> str | None:
        """Why the model does not answer yet; None if it does, or if the server has no /ready. ApiError."""
        response = await self._get("/ready")
        if response.status_code != 503:
            return None
        return _problem(response.content).message or "it is not ready"

    async def _get(self, path: str) -> httpx.Response:
        try:
            return await self._http.get(path, timeout=self.config.connect)
        except httpx.RequestError as error:
            raise self._away(error) from error

    # --- answers

    def complete(
        self, prompt: str, sampling: Sampling, model: Model, routing: bool = False
    ) -> AsyncGenerator[Piece, None]:
        """The continuation of a prompt, piece by piece. ApiError."""
        return self._answer("/v1/completions", {"prompt": prompt}, sampling, model, routing)

    def chat(
        self, messages: Sequence[Mapping[str, str]], sampling: Sampling, model: Model, routing: bool = False
    ) -> AsyncGenerator[Piece, None]:
        """The assistant's next turn; messages have `role` and `content`. ApiError."""
        said = [{"role": m["role"], "content": m["content"]} for m in messages]
        return self._answer("/v1/chat/completions", {"messages": said}, sampling, model, routing)

    async def _answer(
        self, path: str, asked: dict[str, Any], sampling: Sampling, model: Model, routing: bool
    ) -> AsyncGenerator[Piece, None]:
        body = {"model": model.id, **asked, **sampling.body, "stream": True, "stream_options": {"include_usage": True}}
        if routing and model.routes:
            body["return_routing"] = True
        try:
            async with self._http.stream("POST", path, json=body, headers={"accept": "text/event-stream"}) as response:
                if response.status_code >= 300:
                    raise refusal(response.status_code, await response.aread(), response.headers, self.url)
                async with aclosing(EventSource(response).aiter_sse()) as events:
                    async for event in events:
                        if event.data == "[DONE]":
                            return
                        yield self._piece(event.data, path)
        except SSEError:
            raise self._foreign(f"POST {path}") from None
        except httpx.ReadTimeout:
            raise Broken(f"No token came for {self.config.patience:g} seconds, so the page gave up.") from None
        except httpx.RequestError as error:
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                raise self._away(error) from error
            raise Broken(
                f"The connection to {self.url} broke before the answer was complete ({_why(error)})."
            ) from None
        raise Broken("The answer broke off: the server closed the stream without saying that it was complete.")

    def _piece(self, data: str, path: str) -> Piece:
        """What an event adds. ApiError: it tells of one, or is none of this API's."""
        try:
            chunk = Chunk.model_validate_json(data)
        except ValidationError:
            raise self._foreign(f"POST {path}") from None
        if chunk.error is not None:
            raise Broken(f"The server gave the answer up: {chunk.error.message or 'it did not say why'}")
        return chunk.piece()

    # --- what went wrong

    def _away(self, error: httpx.RequestError) -> Away:
        if isinstance(error, httpx.TimeoutException):
            return Away(f"The API at {self.url} does not answer within {self.config.connect:g} seconds.")
        return Away(f"There is no API at {self.url} ({_why(error)}).")

    def _foreign(self, what: str) -> Away:
        return Away(f"What answers at {self.url} is not this API: its answer to {what} has another shape.")


def refusal(status: int, content: bytes, headers: Mapping[str, str], url: str) -> ApiError:
    """An answer that is an error, in words. headers: with lower-case names, or of httpx."""
    problem, after = _problem(content), retry_after(headers.get("retry-after"))
    reason = problem.message
    said = f": {reason}" if reason else ""
    if status in (401, 403):
        return KeyRefused(f"The API refuses the key{said}", status)
    if status in (429, 503):
        when = "" if after is None else f" It asks to wait {after} second{'' if after == 1 else 's'}."
        return Busy(f"The API is busy{said or '.'}{when}", status, after)
    if 300 <= status < 400:
        return Away(f"{url} sends the page elsewhere (HTTP {status}); give --api the address itself.", status)
    if status == 404 and not reason:
        return Away(f"What answers at {url} is not this API: it has no such path (HTTP 404).", status)
    if status < 500:
        return Refused(reason or f"The API refuses the request (HTTP {status}).", status, code=problem.code)
    return Failed(f"The API failed (HTTP {status}){said or '.'}", status, after)


def retry_after(value: str | None) -> int | None:
    """Seconds to wait, of a Retry-After header: a number or a date. None: absent, or neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return int(value)
    try:
        return max(0, math.ceil(parsedate_to_datetime(value).timestamp() - time.time()))
    except (TypeError, ValueError, OverflowError):
        return None


def nearby(host: str) -> bool:
    """Whether a host is this machine or on its own network (a container's name), where no proxy is asked."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".localhost"))


class _Body(Told):
    """OpenAI's shape, FastAPI's, /ready's."""

    error: Problem | str | None = None
    detail: str | None = None
    reason: str | None = None


def _problem(content: bytes) -> Problem:
    """What the body of an error says; nothing if it cannot be read."""
    try:
        body = _Body.model_validate_json(content)
    except ValidationError:
        return Problem()
    if isinstance(body.error, Problem):
        return body.error
    return Problem(message=body.error or body.detail or body.reason or "")


def _why(error: BaseException) -> str:
    """In words: what lies under what httpx says."""
    said, inner = str(error) or type(error).__name__, list[BaseException | None]([error])
    while inner:
        each = inner.pop()
        if isinstance(each, ConnectionRefusedError):
            return "nothing listens there"
        if isinstance(each, socket.gaierror):
            return "there is no such host"
        if isinstance(each, ssl.SSLError):
            return f"TLS failed: {each.reason or each}"
        if each is not None:  # a name may have several addresses: their errors come as a group
            inner += [each.__cause__ or each.__context__, *getattr(each, "exceptions", ())]
    return said
