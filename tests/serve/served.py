"""A tiny model behind the real engine and a real socket, and a client of the standard library."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_models import tiny_model

from fathom.generate.generator import Generator
from fathom.serve.answers import ModelDetails
from fathom.serve.api import Api, ServerConfig, Service, create_app
from fathom.serve.chat import PlainChat
from fathom.serve.engine import Engine, EngineConfig, Progress
from fathom.serve.worker import Worker
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.tokenizer.train import byte

WINDOW, VOCABULARY, NAME = 160, 263, "tiny"  # one id more than the tokenizer has
DETAILS = ModelDetails(
    step=7, parameters=11, active_parameters=5, cache_bytes_per_token=44, num_hidden_layers=2, moe_layers=[1],
    n_routed_experts=6, num_experts_per_tok=2, num_nextn_predict_layers=1, dtype="float32", device="cpu",
    quantization=None, val_loss=None,
)  # fmt: skip


class Gated(Engine):
    """An engine whose steps have to be let through."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Semaphore(0)
        self.free = threading.Event()
        self.free.set()
        self.broken = False

    def step(self) -> list[Progress]:
        while not self.free.is_set() and not self.gate.acquire(timeout=0.01):
            pass
        if self.broken:
            raise ArithmeticError("it broke")
        return super().step()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json"
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        assert self.headers["content-type"].startswith("text/event-stream")
        parts = self.body.decode().split("\n\n")
        assert parts[-1] == "", "a stream ends with an empty line"
        assert all(part.startswith("data: ") for part in parts[:-1])
        assert parts[-2] == "data: [DONE]"
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@dataclass
class Served:
    port: int
    api: Api
    engine: Gated
    tokenizer: Tokenizer
    generator: Generator

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        connection = self.connect()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            sent.setdefault("content-type", "application/json")
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, raw, sent)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.ask("POST", path, body, **headers)

    def idle(self) -> bool:
        """Whether nothing is left of any request: in the engine, in its cache, in the API."""
        stats = self.engine.stats()
        left = (stats.running, stats.waiting, stats.cache_blocks_used, self.api.exchange.calls)
        return left == (0, 0, 0, 0)


def until(true: Any, seconds: float = 10.0) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextmanager
def served(config: ServerConfig | None = None, **engine: Any) -> Iterator[Served]:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": WINDOW}
    model = tiny_model("mla_low_rank", "v3", 1, **sizes).eval()
    tokenizer = byte()
    gated = Gated(model, tokenizer, EngineConfig(**{"max_num_seqs": 8, **engine}))
    service = Service(
        (NAME, "alias/two"), WINDOW, VOCABULARY, DETAILS, tokenizer, PlainChat(tokenizer), partial(Worker, gated)
    )
    app = create_app(service, config)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(port, app.state.api, gated, tokenizer, Generator(model, tokenizer))
    finally:
        gated.free.set()
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not end"
