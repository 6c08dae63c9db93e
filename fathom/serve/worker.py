"""A thread that owns an engine: requests come from anywhere, tokens are delivered once a step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count

import torch

from fathom.generate.request import Request
from fathom.log import log
from fathom.serve.engine import Engine, Progress, Stats


class QueueFull(Exception):
    """Too many wait already. retry_after: seconds after which there may be room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after} seconds")
        self.retry_after = retry_after


class Closed(Exception):
    """No more requests are taken: the worker drains, has stopped, or broke."""


class Worker:
    """deliver: called in the worker's thread, once a step, with what became known in it; it must not block. threads:
    CPU threads of the engine, set in the worker's thread; None: PyTorch's choice.

    An exception inside the engine is a bug: all open requests end as `failed`, `failure` says why, and no more are
    taken.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[Progress]], None], threads: int | None = None) -> None:
        self.engine, self.deliver, self.threads = engine, deliver, threads
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._work, name="fathom-engine", daemon=True)
        self._wake = threading.Condition()
        self._inbox: deque[tuple[int, Request, float | None]] = deque()
        self._cancelled: deque[int] = deque()
        self._tickets = count(1)
        self._open: set[int] = set()
        self._closed = self._stopping = False
        self._ends: deque[float] = deque(maxlen=64)  # when the newest requests ended

    @property
    def running(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive() and self.failure is None

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, request: Request, *, deadline: float | None = None) -> int:
        """Queue a request; its ticket. RequestError: it can never be honoured. QueueFull: come again later. Closed: not
        here. May be called from any thread."""
        self.engine.check(request)
        with self._wake:
            if self._closed or self.failure is not None:
                raise Closed(self.failure or "the server is shutting down and takes no more requests")
            free = max(0, self.engine.config.max_num_seqs - len(self.engine.scheduler.running))
            waiting = len(self._inbox) + len(self.engine.scheduler.waiting)
            if waiting >= self.engine.config.max_num_queued + free:
                raise QueueFull(waiting, self._retry_after(waiting))
            ticket = next(self._tickets)
            self._open.add(ticket)
            self._inbox.append((ticket, request, deadline))
            self._wake.notify()
        return ticket

    def _retry_after(self, waiting: int) -> int:
        """Seconds until half of the queue has moved on, at the pace of the newest ends; 1 to 60."""
        if len(self._ends) < 2:
            return 1
        pace = (time.monotonic() - self._ends[0]) / len(self._ends)
        return int(min(60, max(1, round(pace * waiting / 2))))

    def cancel(self, ticket: int) -> None:
        """End a request as it stands; unknown ones are ignored. May be called from any thread."""
        with self._wake:
            self._cancelled.append(ticket)
            self._wake.notify()

    def stats(self) -> Stats:
        """The engine's numbers; requests that it has not seen yet count as waiting."""
        stats, inbox = self.engine.stats(), len(self._inbox)
        return stats if not inbox else Stats(**{**vars(stats), "waiting": stats.waiting + inbox})

    def drain(self) -> None:
        """Take no more requests; those that were taken go on."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def stop(self, timeout: float) -> bool:
        """Drain, wait so many seconds, end what is left, and leave the thread; true: everything ended by itself."""
        self.drain()
        end = time.monotonic() + timeout
        while self._open and self.running and time.monotonic() < end:
            time.sleep(0.02)
        clean = not self._open
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        return clean

    def _work(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            while self._turn():
                pass
        except Exception as error:
            log.exception("the engine broke")
            self._break(f"{type(error).__name__}: {error}")

    def _turn(self) -> bool:
        """Wait for work and do a step of it; false: time to leave."""
        with self._wake:
            while not (self._inbox or self._cancelled or self.engine.has_work or self._stopping):
                self._wake.wait()
            inbox, self._inbox = self._inbox, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            stopping = self._stopping
            for ticket, request, deadline in inbox:
                self.engine.add(request, deadline=deadline, ticket=ticket)
        for ticket in self._open.copy() if stopping else cancelled:
            self.engine.cancel(ticket)
        if self.engine.has_work:
            self._pass_on(self.engine.step())
        return not stopping or self.engine.has_work

    def _pass_on(self, progress: list[Progress]) -> None:
        for ended in (p for p in progress if p.end is not None):
            self._open.discard(ended.ticket)
            self._ends.append(time.monotonic())
        if progress:
            self.deliver(progress)

    def _break(self, failure: str) -> None:
        """End everything that is open, in words. The engine is not asked: it broke."""
        with self._wake:
            self.failure = failure
            pending = [(ticket, request) for ticket, request, _ in self._inbox]
            self._inbox.clear()
        for ticket, request in pending:
            self.engine.add(request, ticket=ticket)
        for ticket in self._open.copy():
            self.engine.cancel(ticket, "failed", failure)
        self._pass_on(self.engine.take_ended())
