"""Who is told what and when, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fathom.generate.request import Completion, Request, TokenOutput
from fathom.serve import exchange as module
from fathom.serve.engine import End, Progress, Timing
from fathom.serve.exchange import Call, Exchange
from fathom.serve.worker import Closed

A = TokenOutput(5, "a")
END = End("length", Completion("", (1,), (A,)), 0, Timing(0, 0, 0, 0, 0))


class Worker:
    """Notes what it is asked."""

    def __init__(self, deliver: Callable[[list[Progress]], None]) -> None:
        self.deliver, self.tickets, self.room = deliver, 0, 99
        self.cancelled: list[int] = []

    def start(self) -> None:
        pass

    def submit(self, request: Request, *, deadline: float | None = None) -> int:
        if self.tickets == self.room:
            raise Closed
        self.tickets += 1
        return self.tickets

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)


def run(act: Callable[[Exchange, Worker], Any]) -> None:
    async def go() -> None:
        found = Exchange(Worker)  # type: ignore[arg-type]
        found.start()
        await act(found, found.worker)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(go(), 10))


def asked(count: int = 1) -> list[Request]:
    return [Request((1,))] * count


async def quiet(call: Call) -> bool:
    """Whether a call stays asleep while the loop turns."""
    waiting = asyncio.ensure_future(call.news())
    for _ in range(5):
        await asyncio.sleep(0)
    asleep = not waiting.done()
    waiting.cancel()
    return asleep


def test_the_first_news_and_ends_come_at_once_and_the_rest_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 3600.0)

    async def act(exchange: Exchange, worker: Worker) -> None:
        exchange._rang = asyncio.get_running_loop().time()
        call = exchange.open(asked(), streaming=True)
        worker.deliver([Progress(1, (A,))])
        assert await call.news() == [(0, Progress(1, (A,)))]
        for _ in range(3):
            worker.deliver([Progress(1, (A,))])
        await asyncio.sleep(0)
        assert not call._bell.is_set()
        worker.deliver([Progress(1, (A,), END)])
        await asyncio.sleep(0)
        assert call._bell.is_set()
        assert [progress.end for _, progress in await call.news()] == [None] * 3 + [END]
        assert await call.news() == []
        assert exchange.calls == 0
        assert exchange._ringing is not None
        exchange._ringing.cancel()

    run(act)


def test_the_loop_sleeps_while_a_ring_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 0.05)
    woken: list[int] = []

    async def act(exchange: Exchange, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: woken.append(1) or wake(*given))
        call = exchange.open(asked(), streaming=True)
        worker.deliver([Progress(1, (A,))])
        await call.news()
        for _ in range(2):
            for _ in range(5):
                worker.deliver([Progress(1, (A,))])
            assert len(await call.news()) == 5
        worker.deliver([Progress(1, (), END)])
        assert len(await call.news()) == 1
        assert not exchange._heard

    run(act)
    assert len(woken) == 4  # the first news, two rings, the end


def test_slow_steps_are_told_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 0.0)

    async def act(exchange: Exchange, worker: Worker) -> None:
        call = exchange.open(asked(), streaming=True)
        for _ in range(4):
            worker.deliver([Progress(1, (A,))])
            assert len(await call.news()) == 1

    run(act)


def test_a_late_bell_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 0.0)

    async def act(exchange: Exchange, worker: Worker) -> None:
        call = exchange.open(asked(2), streaming=True)
        worker.deliver([Progress(1, (A,))])
        assert len(await call.news()) == 1
        worker.deliver([Progress(2, (A,)), Progress(1, (), END)])  # the end rings at once, the timer a little later
        assert len(await call.news()) == 2
        assert await quiet(call)

    run(act)


def test_who_wants_whole_answers_is_woken_by_ends_alone() -> None:
    async def act(exchange: Exchange, worker: Worker) -> None:
        call = exchange.open(asked(2), streaming=False)
        worker.deliver([Progress(1, (A,)), Progress(2, (A,))])
        assert await quiet(call)
        worker.deliver([Progress(2, (A,), END)])
        assert [index for index, _ in await call.news()] == [0, 1, 1]
        assert await quiet(call)
        worker.deliver([Progress(1, (), END)])
        assert len(await call.news()) == 1
        assert await call.news() == []

    run(act)


def test_all_or_none() -> None:
    async def act(exchange: Exchange, worker: Worker) -> None:
        worker.room = 2
        with pytest.raises(Closed):
            exchange.open(asked(3), streaming=True)
        assert worker.cancelled == [1, 2]
        assert exchange.calls == 0
        worker.deliver([Progress(1, (), END)])
        await asyncio.sleep(0.01)

    run(act)


def test_ends_are_told_even_if_nobody_waits() -> None:
    told: list[End] = []

    async def act(exchange: Exchange, worker: Worker) -> None:
        exchange.ended = told.append
        call = exchange.open(asked(2), streaming=True)
        call.hang_up()
        assert worker.cancelled == [1, 2]
        assert await call.news() == []
        worker.deliver([Progress(1, (), END), Progress(2, (), END)])
        await asyncio.sleep(0.01)
        assert told == [END, END]

    run(act)
