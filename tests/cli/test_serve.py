"""`fathom serve` as a process: it says where it listens, drains on SIGTERM, and leaves with 0."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_run import disk_run

from fathom.cli import serve
from fathom.cli.main import main
from fathom.errors import ConfigError, TokenizerError
from fathom.generate.request import Request, SamplingParams
from fathom.load import load
from fathom.serve.engine import EngineConfig
from fathom.tokenizer.chat import JINJA

MANY = {"prompt": "ab", "max_tokens": 60, "ignore_eos": True, "stream": True, "n": 8, "logprobs": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "small"
    disk_run(path)
    return path


def post(port: int, path: str, body: Any) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    return connection.getresponse()


def test_a_server_from_start_to_end(run: Path) -> None:
    """One process, because starting it is what takes time: answers, log, and SIGTERM while eight answers stream."""
    command = [sys.executable, "-m", "fathom", "serve", str(run), "--port", "0", "--served-model-name", "m", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stderr is not None
        found = None
        for line in process.stderr:
            found = re.search(r"m listens at http://127\.0\.0\.1:(\d+)", line)
            if found:
                break
        assert found, "it did not say where it listens"
        port = int(found[1])
        answer = json.load(post(port, "/v1/completions", {"prompt": "The people", "max_tokens": 5, "model": "m"}))
        assert answer["usage"]["completion_tokens"] <= 5
        stream = post(port, "/v1/completions", MANY)
        first = stream.readline()
        process.send_signal(signal.SIGTERM)
        rest = (first + stream.read()).decode()
        assert rest.endswith("data: [DONE]\n\n")
        assert rest.count('"finish_reason":"length"') + rest.count('"finish_reason":"stop"') == 8, "all could finish"
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    *log, last = out.splitlines()
    lines = [json.loads(line) for line in log]
    assert [line["status"] for line in lines] == [200, 200]
    assert lines[0]["path"] == "/v1/completions"
    facts = json.loads(last)
    assert facts["clean"]
    assert facts["generation_tokens"] >= 8 * 60
    assert "SIGTERM" in err
    assert "Traceback" not in err


def test_mistakes_are_told_before_anything_is_loaded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    empty = tmp_path / "keys"
    empty.write_text("# nobody\n")
    for arguments, words in (
        (["--port", str(port)], f"Port {port} of 127.0.0.1 cannot be opened"),
        (["--host", "nowhere.invalid"], "there is no such address"),
        (["--api-key-file", str(empty)], "holds no key"),
        (["--api-key-file", str(tmp_path / "none")], "cannot be read"),
        (["--api-key", "a b"], "--api-key holds an API key"),
    ):
        assert main(["serve", "no-such-run", *arguments]) == 2
        assert words in capsys.readouterr().err
    taken.close()
    before = signal.getsignal(signal.SIGTERM)
    assert main(["serve", str(run), "--port", "0", "--served-model-name", " "]) == 2
    assert "--served-model-name is empty" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(["serve", "no-such-run", "--port", "0"]) == 2
    assert "no-such-run" in capsys.readouterr().err
    assert main(["serve", str(run), "--port", "0", "--speculative", "perhaps"]) == 2
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["serve", str(run), "--port", "0"]) == 2
    assert "pip install 'fathom-lm[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "used"), [(None, 1), (3, 3)])
def test_the_engine_has_the_threads_and_nobody_else(run: Path, given: int | None, used: int) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    try:
        served, _ = serve.made(str(run), "cpu", "float32", "none", given, [], EngineConfig(cache_tokens=64))
        assert torch.get_num_threads() == 1
        worker = served.worker(lambda _: seen.append(torch.get_num_threads()))
        worker.start()
        worker.submit(Request((1, 2), SamplingParams(max_tokens=2)))
        assert worker.stop(30)
        assert seen[-1] == used
    finally:
        torch.set_num_threads(before)


def test_keys_come_from_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("two  # the second\n\nthree\n")
    monkeypatch.setenv("FATHOM_API_KEYS", "four, five")
    assert serve.keys(["one"], file) == ["one", "two", "three", "four", "five"]
    monkeypatch.setenv("FATHOM_API_KEYS", "four,,")
    with pytest.raises(ConfigError, match="FATHOM_API_KEYS holds an API key that is empty"):
        serve.keys([], None)
    monkeypatch.delenv("FATHOM_API_KEYS")
    assert serve.keys([], None) == []


def test_what_is_told_about_a_run(run: Path) -> None:
    opened = load(run)
    found = serve.details(opened, "int8")
    weights = sum(p.numel() for p in opened.model.parameters())
    assert weights > found.parameters > found.active_parameters > 0
    assert (found.step, found.moe_layers, found.n_routed_experts, found.num_experts_per_tok) == (7, [1], 6, 2)
    assert found.cache_bytes_per_token == 2 * (5 + 6) * 4
    assert (found.dtype, found.device, found.quantization, found.val_loss) == ("float32", "cpu", "int8", None)


def test_chat_templates_of_folders(tmp_path: Path) -> None:
    assert serve.chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    for written, found in (
        ({}, None),
        ({"chat_template": "x"}, "x"),
        ({"chat_template": JINJA}, None),
        ({"chat_template": [{"name": "tool_use", "template": "y"}, {"name": "default", "template": "z"}]}, "z"),
    ):
        config.write_text(json.dumps(written))
        assert serve.chat_template(tmp_path) == found
    config.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "y"}]}))
    with pytest.raises(TokenizerError, match="tool_use"):
        serve.chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("w")
    assert serve.chat_template(tmp_path) == "w"
    (tmp_path / "tokenizer").mkdir()
    assert serve.chat_template(tmp_path) is None, "a run's tokenizer is what counts"


def test_the_second_signal_does_not_wait() -> None:
    """In this process: the server's own answer to signals, without a model."""
    import asyncio

    from fathom.serve.server import Server

    class Worker:
        stopped: list[float] = []  # noqa: RUF012

        def stop(self, grace: float) -> bool:
            self.stopped.append(grace)
            time.sleep(0.05)
            return False

    class Exchange:
        worker, draining, calls = Worker(), False, 3

    class State:
        class api:
            exchange = Exchange()

    class App:
        state = State()

    async def go() -> None:
        server = Server(App(), 9.0, lambda: None)  # type: ignore[arg-type]
        server.leave(signal.SIGTERM)
        assert State.api.exchange.draining
        assert not server.should_exit
        server.leave(signal.SIGTERM)
        assert server.should_exit
        assert server.force_exit
        await asyncio.sleep(0.2)
        assert sorted(Worker.stopped) == [0.0, 9.0]
        assert not server.clean

    asyncio.run(go())
