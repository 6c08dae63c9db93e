"""The crowd counts what a server says, whatever the pieces it comes in; the arithmetic of MTP's printout."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fathom.bench.decode import speeds
from fathom.bench.peers.crowd import Crowd
from fathom.bench.serve import ServeBench, _http_cost, _percentiles, _scaling, speculation


class Handler(BaseHTTPRequestHandler):
    """A server whose streams break events over chunks, and send two events in one."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "toy"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.client_address[1], body))
        if body["prompt"] == [666]:
            self._send(400, b'{"error": {"message": "no such token"}}')
            return
        count = body["max_tokens"]
        events = [{"choices": [{"text": "x"}]} for _ in range(count)]
        events.append({"choices": [], "usage": {"completion_tokens": count}})
        if body["prompt"] == [13]:
            events.insert(1, {"error": {"message": "broke"}})
        text = "".join(f"data: {json.dumps(event)}\r\n\r\n" for event in events)
        text += "" if body["prompt"] == [7] else "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        if body["prompt"] == [105]:
            self.send_header("Connection", "close")
        self.end_headers()
        for piece in (text[:10], text[10:75], text[75:]):
            self.wfile.write(f"{len(piece):x}\r\n{piece}\r\n".encode())
            self.wfile.flush()
            time.sleep(0.002)
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def crowd(server: socketserver.TCPServer) -> Crowd:
    return Crowd({"url": f"http://127.0.0.1:{server.server_address[1]}/v1"})


def test_a_crowd_counts(server: Any) -> None:
    told = crowd(server).load("off", [[i] for i in range(100, 106)], 3, 4)
    assert told["tokens"] == 6 * 4
    assert (len(told["first"]), len(told["gaps"])) == (6, 6 * 3)
    assert len({port for port, _ in server.seen}) <= 4  # a connection each, kept alive unless the server closes it
    asked = server.seen[0][1]
    assert (asked["model"], asked["stream"], asked["ignore_eos"], asked["temperature"]) == ("toy", True, True, 0.0)
    assert sorted(body["prompt"] for _, body in server.seen) == [[i] for i in range(100, 106)]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (666, "400 .*no such token"),
        (13, "broke"),
        (7, "without .DONE."),
    ],
)
def test_wrong_answers_are_no_figures(server: Any, prompt: int, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        crowd(server).load("off", [[prompt]], 1, 4)


def test_speculation_adds_up() -> None:
    """Plain steps of 10 ms give a token; drafting ones take 12 ms and give 1.6: the bound is what is measured."""

    def load(seconds: float, tokens: int, step: float, count: int) -> dict[str, Any]:
        return {"seconds": seconds, "tokens": tokens, "steps": [(step, 1)] * count, "drafted": 50, "accepted": 30,
                "speculating": False}  # fmt: skip

    off, on, auto = load(0.8, 80, 0.010, 80), load(0.6, 80, 0.012, 50), load(0.8, 80, 0.010, 80)
    told = speculation({"off": [off] * 3, "on": [on] * 3, "auto": [auto] * 3})
    assert told["acceptance"] == 0.6
    assert told["draft_cost"] == pytest.approx(0.2)
    assert told["bound"] == pytest.approx(1.6 / 1.2)
    assert told["speed_up"]["median"] == pytest.approx(told["bound"])
    assert told["auto_speed_up"]["median"] == 1
    assert (told["auto_speculating"], told["auto_steps"]) == (False, 240)


def test_costs_and_scaling() -> None:
    plan = ServeBench(at_once=(1, 16))
    speeds_of = {
        (("engine", "float32"), 1): [100.0, 50.0], (("engine", "float32"), 16): [600.0, 400.0],
        (("http", "float32"), 1): [95.0, 45.0],
    }  # fmt: skip
    scaling = _scaling(speeds_of, plan)
    assert list(scaling) == ["engine"]
    assert scaling["engine"]["ratio"]["median"] == 7
    cost = _http_cost(speeds_of, plan)
    assert list(cost) == ["1"]
    assert cost["1"]["median"] == pytest.approx(0.075)
    assert _percentiles([]) == {}
    assert _percentiles([3.0, 1.0, 2.0])["p50"] == 2.0
    assert plan.cache_tokens >= 16 * (plan.context + plan.new)


def test_speeds() -> None:
    """Two rows of 9 tokens; one writes for 4 s, the other begins 2 s later and writes for 2 s."""
    assert speeds({"whole": 5.0, "first": 3.0, "early": 6}, 2, 30, 9) == (20.0, 6.0)
    assert speeds({"whole": 5.0, "first": 1.0}, 1, 30, 9) == (30.0, 2.0)
    assert speeds({"whole": 5.0, "each": [4.0, 2.0]}, 2, 30, 9) == (20.0, 6.0)
