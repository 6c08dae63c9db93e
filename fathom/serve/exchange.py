"""Between the event loop and the worker's thread: every HTTP request is a `Call`, which waits for its own news.

    loop    call = exchange.open(requests)      worker.submit, one ticket a request
    thread  deliver(progress of a whole step)   into the mail; the loop is woken at once for first news and for ends,
                                                for the rest once in TOGETHER seconds at most
    loop    each Progress to its call           whose own wake-ups keep to the same rule

so that a fast model does not spend its time on sending single tokens (with a model of 1M parameters and 16 streams that
cost a sixth of the engine's rate, together they cost a fifteenth). A call that wants only whole answers is woken by
ends alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fathom.generate.request import Request
from fathom.serve.engine import End, Progress
from fathom.serve.worker import Worker

Deliver = Callable[[list[Progress]], None]
News = list[tuple[int, Progress]]
TOGETHER = 0.04  # seconds: 25 times in each, as often as a film shows a picture


class Call:
    """The tickets of one HTTP request, by the number of the choice."""

    def __init__(self, exchange: Exchange, streaming: bool) -> None:
        self._exchange, self.streaming = exchange, streaming
        self.open: dict[int, int] = {}  # ticket -> choice
        self.gone = False  # the client hung up
        self._spoke = False
        self._news: News = []
        self._bell = asyncio.Event()

    def put(self, progress: Progress) -> bool:
        """Keep what became known; whether it should be told at once."""
        self._news.append((self.open[progress.ticket], progress))
        if progress.end is not None:
            del self.open[progress.ticket]
            return True
        return self.streaming and not self._spoke

    def ring(self) -> None:
        """Wake whoever waits for news."""
        self._spoke = True
        self._bell.set()

    async def news(self) -> News:
        """What became known since the last time, in order; empty once everything has ended or the client has gone."""
        while self.open:
            await self._bell.wait()
            self._bell.clear()
            if self._news:  # a late bell may ring for what was taken already
                break
        news, self._news = self._news, []
        return [] if self.gone else news

    def cancel(self) -> None:
        """Give up what is still open."""
        for ticket in self.open:
            self._exchange.forget(ticket)
        self.open.clear()
        self._bell.set()

    def hang_up(self, *_: Any) -> None:
        """The client has gone: give up, and tell nobody."""
        self.gone = True
        self.cancel()


class Exchange:
    """The worker, and who waits for what. Everything but `deliver` and `_heard` belongs to the event loop's thread.

    worker: made with the function that it is to hand its news to. ended: told of every end.
    """

    def __init__(self, worker: Callable[[Deliver], Worker], ended: Callable[[End], None] | None = None) -> None:
        self.worker = worker(self.deliver)
        self.ended = ended
        self.draining = False
        self._calls: dict[int, Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mail: deque[Progress] = deque()
        self._heard: set[int] = set()  # tickets that have had news, and no end
        self._expected = False  # a ring is to come, and takes what is in the mail by then
        self._later: dict[Call, None] = {}  # calls with news that wait for others
        self._ringing: asyncio.TimerHandle | None = None
        self._rang = 0.0

    def start(self) -> None:
        """Begin; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    def open(self, requests: Sequence[Request], *, streaming: bool, deadline: float | None = None) -> Call:
        """Submit all requests or none. RequestError, QueueFull, Closed: as the worker's `submit`."""
        call = Call(self, streaming)
        try:
            for choice, request in enumerate(requests):
                ticket = self.worker.submit(request, deadline=deadline)
                # Its news comes through the loop, which is busy here: it cannot overtake these lines.
                call.open[ticket] = choice
                self._calls[ticket] = call
        except BaseException:
            call.cancel()
            raise
        return call

    def forget(self, ticket: int) -> None:
        """Cancel a ticket; nobody listens any more."""
        self._calls.pop(ticket, None)
        self.worker.cancel(ticket)

    @property
    def calls(self) -> int:
        """How many HTTP requests wait for something."""
        return len(set(map(id, self._calls.values())))

    def deliver(self, progress: list[Progress]) -> None:
        """In the worker's thread: hand a step's news over to the loop."""
        urgent = False
        for each in progress:
            urgent = urgent or each.end is not None or each.ticket not in self._heard
            (self._heard.discard if each.end is not None else self._heard.add)(each.ticket)
        self._mail.extend(progress)
        if urgent:
            self._wake(self._take)
        elif not self._expected:
            self._expected = True
            self._wake(self._expect)

    def _wake(self, callback: Callable[[], None]) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(callback)
        except RuntimeError:  # closed in between: the process is ending
            return

    def _take(self) -> None:
        self._sort()
        if self._later:
            self._expect()

    def _sort(self) -> None:
        """The mail to its calls: wake those with first news and ends, and keep the rest for the next ring."""
        while self._mail:
            each = self._mail.popleft()
            call = self._calls.get(each.ticket)
            if each.end is not None:
                self._calls.pop(each.ticket, None)
                if self.ended is not None:
                    self.ended(each.end)
            if call is not None:
                if call.put(each):
                    call.ring()
                elif call.streaming:
                    self._later[call] = None

    def _expect(self) -> None:
        if self._ringing is None:
            loop = asyncio.get_running_loop()
            self._expected = True
            self._ringing = loop.call_at(max(loop.time(), self._rang + TOGETHER), self._ring)

    def _ring(self) -> None:
        self._ringing, self._rang = None, asyncio.get_running_loop().time()
        self._expected = False  # what comes from here on expects a ring of its own
        self._sort()
        calls, self._later = self._later, {}
        for call in calls:
            call.ring()
