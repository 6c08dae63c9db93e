"""Where every HTTP request enters and leaves: its id, its key, its rate, its line in the log.

A plain ASGI wrapper, so that streams pass through it untouched. The log never holds a prompt, an answer or a key.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import orjson
from starlette.requests import ClientDisconnect

from fathom.log import log
from fathom.serve.failures import ApiError
from fathom.serve.limits import Keys, Rates, Standing, short
from fathom.serve.metrics import Meters

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NOTE = "fathom.note"
OPEN = frozenset({"/health", "/ready", "/openapi.json"})  # they need no key
FREE = OPEN | {"/metrics", "/v1/models"}  # they count against no rate
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
access_log = logging.getLogger("fathom.access")


@dataclass
class Note:
    """What is known of a request: for its headers, and for its line in the log.

    caller     whose rate it counts against: a key, or an address where there are no keys
    prompt_tokens, completion_tokens, first_token (seconds), finish: of what the engine did
    """

    id: str
    caller: str
    key: str | None = None
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    path: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token: float | None = None
    finish: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def line(self, method: str, path: str) -> bytes:
        """One JSON object."""
        facts = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": self.id,
            "method": method,
            "path": path,
            "status": self.status,
            "ms": round((time.perf_counter() - self.started) * 1000, 1),
            "key": self.key,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "first_token_ms": None if self.first_token is None else round(self.first_token * 1000, 1),
            "finish": self.finish,
        }
        return orjson.dumps({name: value for name, value in facts.items() if value is not None})


def note_of(scope: Scope) -> Note:
    """The note of a request."""
    note: Note = scope[NOTE]
    return note


class Door:
    """In front of an app. ApiErrors of its own: 401, 429; anything that the app failed to catch is told as 500."""

    def __init__(self, app: App, keys: Keys, rates: Rates, meters: Meters) -> None:
        self.app, self.keys, self.rates, self.meters = app, keys, rates, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        note = scope[NOTE] = self._note(scope)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                extra = {"x-request-id": note.id, **note.headers}
                message["headers"] = [
                    *message.get("headers", ()),
                    *((k.encode(), v.encode()) for k, v in extra.items()),
                ]
            await send(message)

        try:
            self._admit(scope, note)
            await self.app(scope, receive, tell)
        except ApiError as error:
            await refuse(error, tell)
        except ClientDisconnect:
            pass  # in the middle of its body; there is nobody to be told
        except Exception:
            log.exception("request %s: %s %s failed", note.id, scope["method"], scope["path"])
            if note.status:
                raise  # half an answer is out: the connection is closed, and the client sees that it is no whole one
            await refuse(ApiError(500, "The server has a bug; its log says where.", code="internal_error"), tell)
        finally:
            self._left(scope, note)

    def _note(self, scope: Scope) -> Note:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
        client = scope.get("client")
        return Note(id, f"address {client[0] if client else '?'}", path=scope["path"])

    def _admit(self, scope: Scope, note: Note) -> None:
        """ApiError: 401, 429."""
        path = scope["path"]
        if len(self.keys) and path not in OPEN:
            key = bearer(dict(scope["headers"]).get(b"authorization", b""))
            if key is None or not self.keys.known(key):
                said = "is not one of this server's" if key else "is missing: send Authorization: Bearer KEY"
                raise ApiError(401, f"The API key {said}.", code="invalid_api_key",
                               headers={"www-authenticate": "Bearer"})  # fmt: skip
            note.key = short(key)
            note.caller = f"key {note.key}"
        if self.rates and path not in FREE and scope["method"] == "POST":
            standing = self.rates.enter(note.caller)
            note.headers |= standing.headers
            if standing.wait:
                raise too_many(standing)

    def _left(self, scope: Scope, note: Note) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"
        status = note.status or 499  # nobody was there to be told
        note.status = status
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.meters.http.labels(method, path, str(status)).inc()
        if access_log.isEnabledFor(logging.INFO):
            access_log.info(note.line(scope["method"], scope["path"]).decode())


def bearer(header: bytes) -> bytes | None:
    """The key in an Authorization header."""
    scheme, _, key = header.partition(b" ")
    return key.strip() or None if scheme.lower() == b"bearer" else None


def too_many(standing: Standing) -> ApiError:
    """429."""
    seconds = max(1, int(standing.wait + 0.999))
    return ApiError(
        429,
        f"Your {standing.what} a minute are used up; come back in {seconds} s.",
        code="rate_limit_exceeded",
        headers={"retry-after": str(seconds)},
    )


async def refuse(error: ApiError, send: Send) -> None:
    """Send an error."""
    content = error.content
    headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers}
    start = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": start})
    await send({"type": "http.response.body", "body": content})
