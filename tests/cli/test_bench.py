"""`fathom bench`, from the command line: whole benches of a tiny model, and mistakes in words."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fathom.bench.child import Room
from fathom.bench.machine import Surroundings
from fathom.cli.main import main

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
QUICK = ["--config", TINY, "--quick", "--threads", "1"]
PLAIN = "model.mtp.num_nextn_predict_layers=0"


class Inside:
    """A contestant in this process: what it is asked and answers goes through JSON as it would through a pipe."""

    def __init__(self, peer: str) -> None:
        self.room = Room(import_module(f"fathom.bench.peers.{peer}"))
        self.version, self.idle = "1", 0

    def ask(self, call: str, limit: float = 0.0, **given: Any) -> Any:
        return json.loads(json.dumps(self.room.answer(call, json.loads(json.dumps(given)))))

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to end."""


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets a process: importing torch in each takes longer than the bench."""
    monkeypatch.setattr(Surroundings, "child", lambda self, peer, python, **extra: Inside(peer))


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["bench", *words, *QUICK, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.usefixtures("inside")
def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    found = bench(capsys, "train", "--peers", "transformers", "--precision", "float32", PLAIN)
    assert [row["contestant"] for row in found["contestants"]] == ["fathom", "transformers"]
    (ratio,) = found["ratios"]
    assert ratio["speed"]["n"] == 2
    assert abs(ratio["first_loss_difference"]) < 1e-3
    ours = found["contestants"][0]
    assert ours["memory"]["state"] == 16 * found["parameters"]
    speed = ours["tokens_per_second"]["median"]
    assert ours["mfu"] == speed * found["training_flops_per_token"] / found["machine"]["gemm_flops"]["float32"]
    assert found["step"]["tokens"] == 256
    assert found["left_out"] == {}


@pytest.mark.usefixtures("inside")
def test_a_peer_that_would_take_all_day_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    words = ["--peers", "transformers", "--precision", "bfloat16", "--slow", "1", "--tokens", "128"]
    patient = ["model.hidden_size=64", PLAIN]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fathom.bench.peers.gauge.Gauge.gemm", lambda self, dtype: {"flops": 1e6, "size": 1})
        found = bench(capsys, "train", *words, *patient)
    assert "a step takes" in found["left_out"]["transformers bfloat16"]
    assert [row["contestant"] for row in found["contestants"]] == ["fathom"]


@pytest.mark.usefixtures("inside")
def test_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    words = ["decode", "--peers", "llama.cpp,transformers", "--weights", "float32", "--context", "16", "--batch", "1,3"]
    assert main(["bench", *words, *QUICK, PLAIN]) == 0
    page = capsys.readouterr().out
    assert page.count("8 of 8 greedy tokens as fathom's") == 2
    assert page.count("3 x 16") == 3 + 2  # contestants, ratios
    assert all(len(line) <= 80 for line in page.splitlines() if line.startswith((" fathom", " llama", " transf")))


@pytest.mark.usefixtures("inside")
def test_serving_with_mtp(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--at-once", "1,3", *QUICK]) == 0
    page = capsys.readouterr().out
    for words in ("engine, 3 at once : 1", "HTTP costs", "192.0 bytes a token measured, 192 by the formula",
                  "acceptance a", "speculative: auto"):  # fmt: skip
        assert words in page
    assert "left out" not in page


@pytest.mark.usefixtures("inside")
def test_data(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "data", PLAIN)
    assert [row["part"] for row in found["rows"]] == ["encode", "shards", "batches"]
    assert all(row["against_training"] > 0 for row in found["rows"])


def test_processes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "train", "--peers", "none", "--precision", "float32")
    (ours,) = found["contestants"]
    assert ours["version"]
    assert ours["memory"]["idle"] > 1e8  # torch
    assert 1e6 < ours["memory"]["above"] < 1e9
    assert found["ratios"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--peers", "gpt4"], "no peer gpt4"),
        (["decode", "--peers", "vllm=nowhere"], "nowhere is no interpreter"),
        (["train", "--precision", "int4"], "--precision is int4"),
        (["train", "optimizer.kind=muon", "--peers", "none"], "optimizer.kind=adamw"),
        (["decode", "--weights", "int4"], "--weights is int4; possible are float32, bfloat16, int8"),
        (["decode", "--batch", "0"], "--batch is 0"),
        (["decode", "--context", "1,,2"], "--context is 1,,2"),
        (["decode", "--context", "4096", "--peers", "none"], "the model's window holds 128"),
        (["decode", "--plot", "x"], "give --sweep context"),
        (["serve", "--url", "https://x"], "possible is http://host:port"),
        (["serve", "--context", "100", "--new", "64"], ""),
        (["data", "--allocator", "mimalloc"], "possible are system, tcmalloc"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not said:
        said, words = "holds 128", [*words[:1], "--context", "100", "--new", "64", "--config", TINY]
        assert main(["bench", *words]) == 2
    else:
        assert main(["bench", *words, *QUICK]) == 2
    assert said in capsys.readouterr().err
