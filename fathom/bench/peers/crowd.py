"""A lean crowd of clients in a process of its own: streams over plain HTTP/1.1, a connection each, kept alive."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

PACKAGES = ("fathom-lm",)


class Crowd:
    """job: {url (http://host:port), model or None for the server's first, texts: prompts are texts}."""

    def __init__(self, job: dict[str, Any]) -> None:
        parts = urlsplit(job["url"])
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.model = job.get("model") or asyncio.run(self._first_model())
        self.setting = {"url": job["url"], "model": self.model}

    async def _first_model(self) -> str:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            status, body = await _exchange(reader, writer, self._head("GET", "/v1/models", 0), b"")
        finally:
            writer.close()
        if status != 200:
            raise RuntimeError(f"GET /v1/models: {status} {body.decode(errors='replace')[:200]}")
        return str(json.loads(body)["data"][0]["id"])

    def _head(self, method: str, path: str, length: int) -> bytes:
        return (
            f"{method} {self.base}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    def load(self, mode: str, prompts: list[Any], at_once: int, new: int) -> dict[str, Any]:
        """As `Server.load` has it, timed by when pieces of a stream arrive. mode: is the server's own affair."""
        return asyncio.run(self._load(prompts, at_once, new))

    async def _load(self, prompts: list[Any], at_once: int, new: int) -> dict[str, Any]:
        waiting = list(reversed(prompts))
        first: list[float] = []
        gaps: list[float] = []
        tokens = 0

        async def client() -> None:
            nonlocal tokens
            while waiting:
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    kept = True
                    while waiting and kept:
                        count, kept = await self._stream(reader, writer, waiting.pop(), new, first, gaps)
                        tokens += count
                finally:
                    writer.close()

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(min(at_once, len(prompts)))))
        return {"seconds": time.perf_counter() - start, "tokens": tokens, "first": first, "gaps": gaps}

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        prompt: Any,
        new: int,
        first: list[float],
        gaps: list[float],
    ) -> tuple[int, bool]:
        """One answer: how many tokens the server says that it has, and whether the connection can be used again."""
        body = json.dumps(
            {
                "model": self.model, "prompt": prompt, "max_tokens": new, "temperature": 0.0, "stream": True,
                "stream_options": {"include_usage": True}, "ignore_eos": True,
            }
        ).encode()  # fmt: skip
        last, silent, count, ended = time.perf_counter(), True, 0, False
        writer.write(self._head("POST", "/v1/completions", len(body)) + body)
        status, headers = await _headers(reader)
        if status != 200:
            said = b"".join([piece async for piece in _body(reader, headers)])
            raise RuntimeError(f"POST /v1/completions: {status} {said.decode(errors='replace')[:300]}")
        async for line in _lines(_body(reader, headers)):
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]":
                ended = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the stream broke: {event['error']}")
            if event.get("usage"):
                count = int(event["usage"]["completion_tokens"])
            if event.get("choices"):
                now = time.perf_counter()
                (first if silent else gaps).append(now - last)
                last, silent = now, False
        if not ended or not count:
            raise RuntimeError("the stream ended without [DONE] and the count of its tokens")
        return count, headers.get("connection", "").lower() != "close"


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes, body: bytes
) -> tuple[int, bytes]:
    writer.write(head + body)
    status, headers = await _headers(reader)
    return status, b"".join([piece async for piece in _body(reader, headers)])


async def _headers(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, their names in small letters."""
    line = await reader.readline()
    if not line.startswith(b"HTTP/1."):
        raise RuntimeError(f"the server closed the connection, or speaks no HTTP/1: {line[:80]!r}")
    status, headers = int(line.split()[1]), {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return status, headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Pieces as they arrive."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        yield await reader.readexactly(int(headers.get("content-length", 0)))
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readline()
    await reader.readline()


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines of a body, without their ends."""
    held = b""
    async for piece in pieces:
        *whole, held = (held + piece).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
