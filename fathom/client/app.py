"""The page as a server: Gradio in a FastAPI of its own, with /health, and headers that keep the browser at home."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import gradio as gr
import uvicorn
from fastapi import FastAPI, Response
from pydantic import Field
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fathom.client.http import Api, ApiConfig
from fathom.client.page import Page
from fathom.client.style import CSS, ICON, theme
from fathom.errors import ConfigError
from fathom.knobs import Knobs
from fathom.log import log

HEADERS = {
    # Gradio's own scripts are inline, and make functions of templates; nothing may come from, or go to, anywhere else.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class PageConfig(Knobs):
    """Where the page stands."""

    host: str = "127.0.0.1"
    """0.0.0.0 lets other machines in: whoever reaches the page uses its API key."""
    port: int = Field(default=7860, ge=0, le=65535)
    """0: any that is free."""
    root_path: str = ""
    """The path under which a reverse proxy shows the page, such as /fathom."""


class Guard:
    """ASGI middleware: HEADERS on every answer, and no uploads, for which the page has no use."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"].endswith("/upload"):
            await Response(status_code=404)(scope, receive, send)
        else:

            async def guarded(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    for name, value in HEADERS.items():
                        headers.setdefault(name, value)
                await send(message)

            await self.app(scope, receive, guarded)


def application(api: Api, root_path: str = "") -> FastAPI:
    """The page as an ASGI application. It closes the API's connections when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await api.close()

    app = FastAPI(title="Fathom", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether this process answers; whether the API does, the page itself tells."""
        return {"status": "ok"}

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    gr.mount_gradio_app(
        app,
        Page(api).blocks,
        path="/",
        root_path=root_path or None,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme(),
        css=CSS,
    )
    app.add_middleware(Guard)
    return app


def listen(config: PageConfig) -> socket.socket:
    """A socket at the address. ConfigError: it is taken, or not this machine's."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"The page cannot stand at {config.host}:{config.port}: {error.strerror or error}; "
            "choose another --port (0: any that is free) or --host."
        ) from None
    return bound


class Server(uvicorn.Server):
    """uvicorn's, which calls `up` once it listens."""

    def __init__(self, config: uvicorn.Config, up: Callable[[], None]) -> None:
        super().__init__(config)
        self.up = up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self.up()


def run(page: PageConfig, api: ApiConfig) -> None:
    """Serve the page until SIGINT or SIGTERM. ConfigError: the address of either is impossible."""
    client = Api(api)
    with listen(page) as bound:  # before Gradio takes its time, so that a port in use is told at once
        host, port = bound.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

        def up() -> None:
            log.info("The page is at %s, and asks the API at %s. Ctrl-C ends it.", url, client.url)

        config = uvicorn.Config(
            application(client, page.root_path),
            log_level="warning",
            timeout_graceful_shutdown=3,  # open pages hold a connection each
            root_path=page.root_path,
        )
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once everything is closed
            Server(config, up).run(sockets=[bound])
