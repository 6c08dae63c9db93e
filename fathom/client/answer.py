"""An answer as it grows: pieces in, now and then the whole so far out, and a way to stop.

A page need not be told of every token: what comes within a blink is told together, which keeps a fast model from
flooding the browser. Stopping cancels the task that reads, which closes the connection, which frees the model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from fathom.client.http import ApiError
from fathom.client.wire import Piece, RoutedToken, Usage

BLINK = 0.06  # seconds


@dataclass
class Answer:
    """What is known of an answer.

    routing       one entry a token, where the server tells it
    began, last   seconds (monotonic) of the request and of the latest piece; first: of the first
    stopped       by the user
    left_out      turns of the conversation that the model was not shown
    """

    text: str = ""
    routing: list[RoutedToken] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    error: ApiError | None = None
    stopped: bool = False
    left_out: int = 0
    pieces: int = 0
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None

    def add(self, piece: Piece) -> None:
        """Take a piece in."""
        self.left_out += piece.left_out
        self.last = time.monotonic()
        if piece.text or piece.routing:
            self.first = self.first or self.last
            self.pieces += 1
        self.text += piece.text
        self.routing.extend(piece.routing)
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.usage = piece.usage or self.usage

    @property
    def tokens(self) -> int:
        """How many came: as the server counts, or as the routing or the pieces tell."""
        return (self.usage.completion_tokens if self.usage else 0) or len(self.routing) or self.pieces

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first; None if too few came to tell."""
        if self.first is None or self.last is None or self.tokens < 2 or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)


class Reading:
    """An answer that is being read. Iterate over it once; `stop` ends it from elsewhere in the same event loop."""

    def __init__(self, pieces: AsyncGenerator[Piece, None], blink: float = BLINK) -> None:
        self.answer = Answer()
        self._pieces, self._blink = pieces, blink
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """End it now; what came stays."""
        self.answer.stopped = True
        if self._task is not None:
            self._task.cancel()

    async def __aiter__(self) -> AsyncGenerator[Answer, None]:
        """The answer so far, whenever there is more of it, and at its end. Leaving the loop ends it too. ApiErrors are
        told in `answer.error`: what came before one is part of the answer."""
        if self.answer.stopped:
            yield self.answer
            return
        self._task = asyncio.create_task(self._read())
        try:
            while not self._task.done():
                await self._news.wait()
                self._news.clear()
                yield self.answer
                await asyncio.wait({self._task}, timeout=self._blink)
            with suppress(asyncio.CancelledError):
                self._task.result()
            yield self.answer
        finally:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _read(self) -> None:
        try:
            # the iterator is a generator; closing it closes the connection
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    self.answer.add(piece)
                    self._news.set()
        except ApiError as error:
            self.answer.error = error
        finally:
            self._news.set()
