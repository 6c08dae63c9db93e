"""Bodies on their way in: of a bounded size, within a bounded time, announced as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from fastapi.requests import Request
from starlette.requests import ClientDisconnect

from fathom.serve.failures import ApiError

T = TypeVar("T")

LONG = 1 << 14  # work on so many bytes is worth a thread
PATIENCE = 2.0  # seconds in which the rest of a body that is too large is passed over, so that the answer is read
CLOSE = {"connection": "close"}


async def body_of(request: Request, most: int, seconds: float) -> bytes:
    """The bytes of a body. ApiError: 408, 413, 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        said = f"The body is announced as {kind or 'nothing'}; send the header Content-Type: application/json."
        raise ApiError(415, said, code="unsupported_media_type")
    announced = request.headers.get("content-length", "")
    parts, size, whole = list[bytes](), 0, False

    async def gather(least: float) -> None:
        """Read on until everything is there, or more than `least` bytes."""
        nonlocal size, whole
        while not whole and size <= least:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part, whole = message.get("body", b""), not message.get("more_body", False)
            size += len(part)
            if size <= most:
                parts.append(part)

    try:
        if not (announced.isdigit() and int(announced) > most):
            await asyncio.wait_for(gather(most), seconds)
            if size <= most:
                return b"".join(parts)
    except asyncio.TimeoutError:
        said = f"The body did not come within {seconds:g} s."
        raise ApiError(408, said, code="timeout", headers=CLOSE) from None
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(gather(math.inf), PATIENCE)
    said = f"The body is larger than the {most} bytes that are read here."
    raise ApiError(413, said, code="body_too_large", headers=CLOSE)


async def aside(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """Do work, in a thread if what it works on has many bytes: the event loop must not wait for it."""
    return work(*arguments) if size < LONG else await asyncio.to_thread(work, *arguments)


def has(raw: bytes, name: str) -> bool:
    """Whether a body is an object with such a member."""
    try:
        found = orjson.loads(raw)
    except ValueError:
        return False
    return isinstance(found, dict) and name in found
