"""What went wrong, as HTTP tells it: a status, and a body in OpenAI's shape.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

type says whose turn it is (the caller's, or the server's), code what happened, param which field of the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

CALLER, SERVER = "invalid_request_error", "server_error"
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
STATUS_TEXT = {
    400: "The request cannot be honoured; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    405: "The path has no such method; the Allow header lists those it has.",
    408: "The body did not come in time.",
    413: "The body is larger than this server reads.",
    415: "The body is not announced as application/json.",
    429: "The queue is full, or the requests or tokens a minute are used up; Retry-After says when to come back.",
    500: "The server has a bug, or its engine broke.",
    503: "The server is shutting down, or its engine broke; Retry-After says when to come back.",
    504: "The deadline passed before the answer was complete.",
}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = TYPES.get(self.status, CALLER if self.status < 500 else SERVER)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def content(self) -> bytes:
        """The body, as bytes; half surrogates that a caller sent are shown as question marks."""
        try:
            return orjson.dumps(self.body)
        except TypeError:  # orjson writes valid UTF-8 only
            self.message = self.message.encode("utf-8", "replace").decode()
            self.param = None if self.param is None else self.param.encode("utf-8", "replace").decode()
            return orjson.dumps(self.body)


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str, code: str, seconds: int, status: int = 503) -> ApiError:
    """503, or 429: come back in so many seconds."""
    return ApiError(status, message, code=code, headers={"retry-after": str(seconds)})
