"""The process around the app: its socket, its signals, its access log.

SIGTERM, SIGINT    /ready says 503 at once and nothing new is taken; what runs may finish, for at most `grace`
                   seconds; then the rest is ended, in words, and the process leaves with code 0
a second signal    ends it now
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from fathom.errors import ConfigError
from fathom.log import log
from fathom.serve.api import Api, create_app
from fathom.serve.door import access_log
from fathom.serve.service import ServerConfig, Service

KEEP_ALIVE = 75  # seconds; longer than clients keep idle connections, so that none is closed under a request
LAST_WORDS = 5.0  # seconds for what has ended to be sent


def bind(host: str, port: int) -> socket.socket:
    """The server's socket; port 0: any free one. ConfigError: the address is in use, or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: there is no such address ({error})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Port {port} of {host} cannot be opened: {error.strerror}. Stop what listens there, or give another "
            "--port."
        ) from None
    return listener


class Server(uvicorn.Server):
    """uvicorn's, with a drain of our own. grace: seconds that running answers have to finish; up: called once it
    listens. clean: whether everything that ran at the end could finish."""

    def __init__(self, app: FastAPI, grace: float, up: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(LAST_WORDS),
            )
        )
        self.api: Api = app.state.api
        self.grace, self.up, self.clean = grace, up, True
        self._leaving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self.up()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals as long as the server runs; uvicorn would raise them again at its end."""
        loop = asyncio.get_running_loop()
        old = {
            each: signal.signal(each, lambda number, _: loop.call_soon_threadsafe(self.leave, number))
            for each in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for each, handler in old.items():
                signal.signal(each, handler)

    def leave(self, number: int) -> None:
        """A signal came."""
        if self._leaving is not None:
            log.warning("a second signal: leaving at once")
            self.should_exit = self.force_exit = True
            threading.Thread(target=self.api.exchange.worker.stop, args=(0.0,), daemon=True).start()
            return
        running = self.api.exchange.calls
        name = signal.Signals(number).name
        log.info("%s: %d requests may finish, for %g s; a second signal ends them", name, running, self.grace)
        self.api.exchange.draining = True
        self._leaving = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        exchange = self.api.exchange
        self.clean = await asyncio.to_thread(exchange.worker.stop, self.grace)
        if not self.clean:
            log.warning("the grace period is over; what still ran was ended")
        self.should_exit = True  # uvicorn closes idle connections and waits a little for the others' last bytes


@contextlib.contextmanager
def accesses(on: bool) -> Iterator[None]:
    """Write the access log to stdout, from a thread of its own: a pipe that nobody reads must not stop the server."""
    if not on:
        access_log.setLevel(logging.CRITICAL)
        yield
        access_log.setLevel(logging.NOTSET)
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, handler)
    front = logging.handlers.QueueHandler(lines)
    access_log.addHandler(front)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
    listener.start()
    try:
        yield
    finally:
        access_log.removeHandler(front)
        access_log.setLevel(logging.NOTSET)
        listener.stop()


def run(
    service: Service,
    config: ServerConfig,
    listener: socket.socket,
    *,
    grace: float,
    up: Callable[[], None],
    log_accesses: bool = True,
) -> bool:
    """Serve until a signal comes, and what ran then has ended; whether all of it could finish."""
    server = Server(create_app(service, config), grace, up)
    with accesses(log_accesses), contextlib.closing(listener):
        server.run(sockets=[listener])
    return server.clean
