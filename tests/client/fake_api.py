"""A small API that speaks the documented wire, with routing, slow streams and every way of failing. No torch.

with served(FakeApi()) as fake:        # fake.url; fake.stop(), fake.start() on the same port
    fake.mode = "busy"
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LAYERS, EXPERTS, CHOSEN = (1, 2, 4), 11, 3
TEXT = (
    " the",
    " people",
    " of",
    " <script>alert(1)</script>",
    " {{value}}",
    " ${1+1}",
    "\n",
    "né",
    "☃",
    " &amp;",
    " 한국",
    ".",
)
MODEL: dict[str, Any] = {
    "id": "demo@520",
    "object": "model",
    "created": 0,
    "owned_by": "fathom",
    "max_model_len": 256,
    "fathom": {
        "step": 520, "parameters": 1_927_456, "active_parameters": 1_031_488, "cache_bytes_per_token": 1_920,
        "num_hidden_layers": 5, "moe_layers": list(LAYERS), "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
        "num_nextn_predict_layers": 1, "dtype": "float32", "device": "cpu", "quantization": None, "val_loss": 3.2153,
    },
}  # fmt: skip


def routed(i: int, text: str) -> dict[str, Any]:
    """A token's routing: a pattern that can be foretold."""
    layers = []
    for n, layer in enumerate(LAYERS):
        experts = [(3 * i + 5 * n + 4 * k) % EXPERTS for k in range(CHOSEN)]
        layers.append({"layer": layer, "experts": experts, "weights": [1.5, 0.75, 0.25]})
    return {"token_id": 100 + i, "token": text, "draft": i % 3 == 1, "layers": layers}


class FakeApi:
    """mode: loading, none (no model), busy, limited, refused, full (four messages are too many), failed, broken, cut,
    error, html, silent; any other is ok.

    key, if set, is asked for. pause: seconds between tokens. said: bodies that came. ended: how each stream ended.
    """

    def __init__(self, mode: str = "ok", key: str | None = None, pause: float = 0.0) -> None:
        self.mode, self.key, self.pause = mode, key, pause
        self.model: dict[str, Any] = json.loads(json.dumps(MODEL))
        self.texts: tuple[str, ...] = TEXT
        self.said: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.ended: list[str] = []
        self.port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/ready", self.ready),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ]
        )

    # --- the server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", self.port))
        self.port = bound.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="critical", timeout_graceful_shutdown=0))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.should_exit = True
        self._thread.join(10)

    # --- the wire

    def _refused(self, request: Request) -> Response | None:
        self.asked.append(request.url.path)
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return problem(401, "The API key is wrong.", "authentication_error")
        if self.mode == "html":
            return Response("<html>hello</html>", media_type="text/html")
        return None

    async def models(self, request: Request) -> Response:
        data = [] if self.mode == "none" else [self.model]
        return self._refused(request) or JSONResponse({"object": "list", "data": data})

    async def ready(self, request: Request) -> Response:
        if self.mode == "loading":
            return JSONResponse({"status": "not ready", "reason": "the weights are being read"}, 503)
        return JSONResponse({"status": "ready"})

    async def complete(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        body = await request.json()
        self.said.append(body)
        if self.mode == "busy":
            return problem(503, "The queue is full.", "server_error", {"retry-after": "7"})
        if self.mode == "limited":
            return problem(429, "Too many requests.", "rate_limit_error", {"retry-after": "1"})
        if self.mode == "refused":
            return problem(400, "The prompt has 300 tokens, and the window holds 256.", "invalid_request_error")
        if self.mode == "full" and len(body["messages"]) > 3:
            return problem(400, "The window is full.", "invalid_request_error", code="context_length_exceeded")
        if self.mode == "failed":
            return problem(500, "The engine failed.", "server_error")
        return StreamingResponse(self.events(body, "chat" in request.url.path), media_type="text/event-stream")

    async def events(self, body: dict[str, Any], chat: bool) -> AsyncIterator[bytes]:
        how = "left"
        try:
            for i in range(body["max_tokens"]):
                if self.mode == "silent":
                    await asyncio.sleep(60)
                if i == 3 and self.mode == "error":
                    yield event({"error": {"message": "The engine failed.", "type": "server_error"}})
                    how = "failed"
                    return
                if i == 3 and self.mode == "cut":
                    how = "cut"
                    return
                if i == 3 and self.mode == "broken":
                    how = "broken"
                    raise ConnectionError("broken on purpose")
                yield event({"choices": [self.choice(i, chat, body)], "usage": None})
                await asyncio.sleep(self.pause)
            end: dict[str, Any] = {"index": 0, "finish_reason": "length", "stop_reason": None}
            yield event({"choices": [end | ({"delta": {}} if chat else {"text": ""})], "usage": None})
            n = body["max_tokens"]
            usage = {
                "prompt_tokens": 9, "completion_tokens": n, "total_tokens": n + 9,
                "prompt_tokens_details": {"cached_tokens": 4},
                "completion_tokens_details": {"accepted_prediction_tokens": n // 3, "rejected_prediction_tokens": 2},
            }  # fmt: skip
            yield event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
            how = "done"
        finally:
            self.ended.append(how)

    def choice(self, i: int, chat: bool, body: dict[str, Any]) -> dict[str, Any]:
        text = self.texts[i % len(self.texts)]
        made: dict[str, Any] = {"index": 0, "finish_reason": None, "stop_reason": None}
        made |= {"delta": {"content": text}} if chat else {"text": text}
        if body.get("return_routing") and self.model.get("fathom"):
            made["routing"] = [routed(i, text)]
        return made


def problem(status: int, message: str, kind: str, headers: dict[str, str] | None = None, code: str = "x") -> Response:
    """OpenAI's shape."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


@contextmanager
def served(fake: FakeApi) -> Iterator[FakeApi]:
    """The API at a free port."""
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()


def until(condition: Any, seconds: float = 10.0) -> bool:
    """Wait for something; whether it came."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())
