"""Who may call, how much, how long; and what happens when somebody goes away."""

from __future__ import annotations

import json
import logging
import threading
import time
from http.client import HTTPConnection
from typing import Any

import pytest
from served import Reply, Served, served, until

from fathom.serve.api import ServerConfig

ASK = {"prompt": "ab", "max_tokens": 100, "ignore_eos": True, "seed": 1}
SHORT = {"prompt": "ab", "max_tokens": 3, "ignore_eos": True}


class Background:
    """A request in a thread of its own."""

    def __init__(self, server: Served, body: dict[str, Any], path: str = "/v1/completions", **headers: str) -> None:
        self.reply: Reply | None = None

        def run() -> None:
            self.reply = server.post(path, body, **headers)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def answer(self) -> Reply:
        self.thread.join(timeout=20)
        assert self.reply is not None, "no answer came"
        return self.reply


def half_a_body(server: Served) -> HTTPConnection:
    """A request of which one byte of ten has come."""
    connection = server.connect()
    connection.putrequest("POST", "/tokenize")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "10")
    connection.endheaders()
    connection.send(b"{")
    return connection


def running(server: Served, count: int = 1) -> None:
    until(lambda: server.api.exchange.calls == count)


# --- keys and rates


def test_keys_open_the_server() -> None:
    with served(ServerConfig(api_keys=("one", "two"))) as server:
        for wrong in ("", "Bearer three", "Basic one", "one", "Bearer "):
            for method, path in (("GET", "/v1/models"), ("POST", "/generate"), ("GET", "/metrics"), ("GET", "/x")):
                reply = server.ask(method, path, None, **({"authorization": wrong} if wrong else {}))
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert reply.error["type"] == "authentication_error"
                assert reply.headers["www-authenticate"] == "Bearer"
        for key in ("one", "two"):
            assert server.post("/v1/completions", SHORT, authorization=f"Bearer {key}").status == 200
        for path in ("/health", "/ready", "/openapi.json"):
            assert server.get(path).status == 200, "they tell nothing that needs a key"
        found = server.get("/openapi.json").json
        assert found["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
        assert "security" not in found["paths"]["/health"]["get"]


def test_rates_are_each_keys_own() -> None:
    with served(ServerConfig(api_keys=("one", "two"), requests_per_minute=2)) as server:
        one, two = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
        for left in ("1", "0"):
            reply = server.post("/v1/completions", SHORT, **one)
            assert (reply.status, reply.headers["x-ratelimit-remaining-requests"]) == (200, left)
        reply = server.post("/v1/completions", SHORT, **one)
        assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
        assert reply.error["type"] == "rate_limit_error"
        assert 1 <= int(reply.headers["retry-after"]) <= 30
        assert reply.headers["x-ratelimit-limit-requests"] == "2"
        assert server.post("/v1/completions", SHORT, **two).status == 200
        assert server.get("/v1/models", **one).status == 200, "what costs nothing is not counted"


def test_tokens_a_minute() -> None:
    with served(ServerConfig(tokens_per_minute=10)) as server:
        assert server.post("/v1/completions", {**SHORT, "max_tokens": 30}).status == 200
        reply = server.post("/v1/completions", SHORT)
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) > 60, "22 tokens of debt at 10 a minute"
        assert reply.headers["x-ratelimit-remaining-tokens"] == "0"


# --- sizes


def test_bodies_may_be_too_large() -> None:
    with served(ServerConfig(max_body=1000)) as server:
        reply = server.post("/v1/completions", {**SHORT, "prompt": "x" * 1000})
        assert (reply.status, reply.error["code"]) == (413, "body_too_large")
        connection = server.connect()
        chunks = (b"x" * 200 for _ in range(20))
        headers = {"content-type": "application/json", "transfer-encoding": "chunked"}
        connection.request("POST", "/tokenize", chunks, headers, encode_chunked=True)
        assert connection.getresponse().status == 413, "also where no length was announced"
        connection.close()


def test_a_body_has_to_come() -> None:
    with served(ServerConfig(body_timeout=0.05)) as server:
        connection = half_a_body(server)
        answer = connection.getresponse()
        assert answer.status == 408
        assert json.loads(answer.read())["error"]["code"] == "timeout"
        connection.close()


def test_who_hangs_up_in_the_middle_of_a_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with served() as server:
        connection = half_a_body(server)
        connection.close()
        line = 'fathom:http_requests_total{method="POST",path="/tokenize",status="499"} 1.0'
        until(lambda: line in server.get("/metrics").body.decode())
    assert "failed" not in caplog.text


# --- the queue


def test_a_full_queue_turns_away_whole_requests() -> None:
    with served(max_num_seqs=1, max_num_queued=1) as server:
        server.engine.free.clear()
        first = Background(server, ASK)
        running(server)
        second = Background(server, ASK)
        running(server, 2)
        reply = server.post("/v1/completions", SHORT)
        assert (reply.status, reply.error["code"]) == (429, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        server.engine.free.set()
        assert first.answer().status == second.answer().status == 200
        assert server.post("/v1/completions", {**SHORT, "n": 3}).status == 429, "none of the three is begun"
        until(server.idle)
        assert 'vllm:admission_rejections_total{model_name="tiny"} 2.0' in server.get("/metrics").body.decode()


# --- time


def test_deadlines() -> None:
    with served(ServerConfig(timeout=0.2)) as server:
        server.engine.free.clear()
        waiting = Background(server, ASK)
        running(server)
        time.sleep(0.25)
        server.engine.free.set()
        reply = waiting.answer()
        assert (reply.status, reply.error["code"], reply.error["type"]) == (504, "deadline_exceeded", "server_error")
        until(server.idle)
    with served() as server:
        assert server.post("/v1/completions", SHORT, x_request_timeout="0.000001").status == 504
        assert server.post("/v1/completions", {**SHORT, "stream": True}, x_request_timeout="1e-6").status == 504
        assert server.post("/v1/completions", SHORT, x_request_timeout="20").status == 200
        for wrong in ("0", "-1", "soon", "nan"):
            reply = server.post("/v1/completions", SHORT, x_request_timeout=wrong)
            assert (reply.status, reply.error["param"]) == (400, "x-request-timeout")
        until(server.idle)


def test_a_deadline_within_a_stream_is_its_last_event() -> None:
    with served() as server:
        server.engine.free.clear()
        server.engine.gate.release(3)
        waiting = Background(server, {**ASK, "stream": True, "logprobs": 0}, x_request_timeout="1")
        time.sleep(1.1)
        server.engine.free.set()
        reply = waiting.answer()
        assert reply.status == 200
        *events, last = reply.events
        assert all(event["choices"] for event in events)
        assert last["error"]["code"] == "deadline_exceeded"
        until(server.idle)


# --- going away


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_is_not_worked_for(stream: bool) -> None:
    with served() as server:
        server.engine.free.clear()
        server.engine.gate.release(2)
        connection = server.connect()
        body = json.dumps({**ASK, "stream": stream, "n": 2, "logprobs": 0})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        if stream:
            answer = connection.getresponse()
            assert answer.readline().startswith(b"data: ")
            answer.close()
        else:
            running(server)
        connection.close()
        until(lambda: server.api.exchange.calls == 0)
        server.engine.free.set()
        until(server.idle)
        assert server.engine.stats().generation_tokens < 2 * 20
        line = 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 2.0'
        until(lambda: line in server.get("/metrics").body.decode())


def test_a_broken_engine_is_told() -> None:
    with served() as server:
        server.engine.free.clear()
        whole = Background(server, ASK)
        begun = Background(server, {**ASK, "stream": True, "logprobs": 0})
        running(server, 2)
        server.engine.gate.release(3)
        until(lambda: server.engine.stats().generation_tokens >= 2)
        time.sleep(0.1)
        server.engine.broken = True
        server.engine.free.set()
        reply = whole.answer()
        assert (reply.status, reply.error["code"]) == (500, "engine_failed")
        assert "it broke" not in reply.error["message"], "inner workings are for the log"
        assert begun.answer().events[-1]["error"]["code"] == "engine_failed"
        assert server.get("/health").status == server.get("/ready").status == 503
        assert "it broke" in server.get("/health").json["reason"]
        reply = server.post("/v1/completions", SHORT)
        assert (reply.status, reply.error["code"]) == (503, "engine_failed")
        assert reply.headers["retry-after"]


def test_a_bug_is_500_in_the_right_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as server:
        monkeypatch.setattr(server.api.asker, "completion", lambda *_: 1 / 0)
        reply = server.post("/v1/completions", SHORT)
        assert (reply.status, reply.error["code"], reply.error["type"]) == (500, "internal_error", "server_error")
        assert reply.headers["x-request-id"]


def test_draining() -> None:
    with served() as server:
        server.engine.free.clear()
        waiting = Background(server, {**SHORT, "stream": True})
        running(server)
        server.api.exchange.draining = True
        server.api.exchange.worker.drain()
        assert server.get("/ready").status == 503
        assert "shutting down" in server.get("/ready").json["reason"]
        assert server.get("/health").status == 200
        reply = server.post("/v1/completions", SHORT)
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "shutting_down", "5")
        server.engine.free.set()
        assert waiting.answer().events[-1]["choices"][0]["finish_reason"] == "length"


def test_what_the_grace_period_cuts_is_told() -> None:
    with served() as server:
        server.engine.free.clear()
        server.engine.gate.release(2)
        whole, begun = Background(server, ASK), Background(server, {**ASK, "stream": True, "logprobs": 0})
        running(server, 2)
        threading.Timer(0.2, server.engine.free.set).start()
        server.api.exchange.worker.stop(0.05)
        assert (whole.answer().status, whole.answer().error["code"]) == (503, "shutting_down")
        assert begun.answer().status in (200, 503)
        if begun.answer().status == 200:
            assert begun.answer().events[-1]["error"]["code"] == "shutting_down"


# --- browsers


def test_cross_origin_is_off_unless_allowed() -> None:
    ask = {"origin": "https://page.example", "access_control_request_method": "POST"}
    with served() as server:
        assert server.ask("OPTIONS", "/v1/completions", None, **ask).status == 405
        assert "access-control-allow-origin" not in server.get("/health", origin="https://page.example").headers
    with served(ServerConfig(cors_origins=("https://page.example",), api_keys=("k",))) as server:
        reply = server.ask("OPTIONS", "/v1/completions", None, **ask)
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://page.example")
        reply = server.post("/v1/completions", SHORT, origin="https://page.example")
        assert reply.status == 401
        assert reply.headers["access-control-allow-origin"] == "https://page.example", "errors can be read too"
        other = server.ask("OPTIONS", "/v1/completions", None, **{**ask, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


# --- the log


def test_the_log_has_a_line_a_request_and_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fathom.access")
    with served(ServerConfig(api_keys=("secret-key",))) as server:
        key = {"authorization": "Bearer secret-key"}
        server.post("/v1/completions", {**SHORT, "prompt": "private"}, **key, x_request_id="r1")
        server.post("/v1/completions", {**SHORT, "prompt": "private", "stream": True}, **key, x_request_id="r2")
        server.post("/v1/completions", {"privat": "private"}, **key, x_request_id="r3")
        server.get("/v1/models", authorization="Bearer wrong-secret", x_request_id="r4")
    text = [record.getMessage() for record in caplog.records if record.name == "fathom.access"]
    lines = {line["id"]: line for line in map(json.loads, text)}
    assert not any(word in line for line in text for word in ("private", "secret"))
    for id, status in (("r1", 200), ("r2", 200), ("r3", 400), ("r4", 401)):
        line = lines[id]
        assert line["status"] == status
        assert {"time", "method", "path", "ms"} <= set(line)
    for id in ("r1", "r2"):
        line = lines[id]
        assert (line["prompt_tokens"], line["completion_tokens"], line["finish"]) == (7, 3, "length")
        assert 0 < line["first_token_ms"] < line["ms"] + 1
        assert len(line["key"]) == 8
    assert "key" not in lines["r4"]
