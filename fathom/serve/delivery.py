"""Answers on the wire: server-sent events as they become known, and what happens when the client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi.responses import Response

from fathom.serve.door import Receive, Scope, Send
from fathom.serve.exchange import Call
from fathom.serve.failures import ApiError
from fathom.serve.stream import DONE, Style, event

STREAMED = "text/event-stream"
NO_STREAM_CACHE = {"cache-control": "no-cache", "x-accel-buffering": "no"}
GONE = 499  # nginx's word for a client that hung up; nobody reads it but the log


class EventStream(Response):
    """Server-sent events from a call, until its end or the client's."""

    def __init__(self, call: Call, style: Style, first: bytes, settle: Callable[[], None]) -> None:
        super().__init__(media_type=STREAMED, headers=NO_STREAM_CACHE)
        del self.headers["content-length"]
        self.call, self.style, self.first, self.settle = call, style, first, settle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        call, style, sent = self.call, self.style, self.first

        async def write(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            while True:
                if sent:
                    await write(sent)
                news = await call.news()
                if not news:
                    break
                sent = await asyncio.to_thread(style.chunks, news) if style.late else style.chunks(news)
            await write(b"" if call.gone else style.last(), more=False)
        except ApiError as error:
            await write(event(error.body) + DONE, more=False)
        finally:
            self.settle()


def watching(receive: Receive, call: Call) -> asyncio.Task[None]:
    """A task that tells the call when the client hangs up."""

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        call.hang_up()

    return asyncio.create_task(until_gone())
