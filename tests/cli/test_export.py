"""`fathom export`: what it writes, what it refuses, what it says of engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_run import disk_run

from fathom.cli.export import size
from fathom.cli.main import main
from fathom.errors import ConfigError
from fathom.load import load
from fathom.verify.engines import Parity


@pytest.fixture
def run(tmp_path: Path) -> str:
    disk_run(tmp_path / "run")
    return str(tmp_path / "run")


def facts(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["export", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_folder_has_the_weights_of_the_run(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = facts(capsys, f"{run}@7", str(out), "--to", "hf", "--shard-size", "20kB")
    assert (found["family"], found["step"], found["to"], found["export"]) == ("deepseek_v3", 7, "hf", str(out))
    assert sorted(found["files"]) == sorted(path.name for path in out.iterdir())
    assert len([name for name in found["files"] if name.endswith(".safetensors")]) > 2
    assert found["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    before, after = load(run).model.state_dict(), load(out).model.state_dict()
    assert sorted(before) == sorted(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_findings_are_warnings(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, run, str(tmp_path / "a"), "--to", "hf")
    assert {"engine", "what", "remedy", "silent"} == set(found["findings"][0])
    assert main(["export", run, str(tmp_path / "b"), "--to", "hf"]) == 0
    out, err = capsys.readouterr()
    assert "deepseek_v3" in out
    for finding in found["findings"]:
        assert f"warning: {finding['engine']}: {finding['what']}; {finding['remedy']}" in err


def test_without_mtp_and_narrow(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = facts(capsys, run, str(tmp_path / "a"), "--to", "hf", "--family", "deepseek_v3")
    small = facts(capsys, run, str(tmp_path / "b"), "--to", "hf", "--no-mtp", "--dtype", "bfloat16")
    assert small["bytes"] < whole["bytes"]
    keys = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (keys["num_nextn_predict_layers"], keys["dtype"]) == (0, "bfloat16")


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_gguf_file_in_llama_cpp(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    disk_run(tmp_path / "run", depths=0)
    out = tmp_path / "model.gguf"
    found = facts(capsys, str(tmp_path / "run"), str(out), "--to", "gguf", "--type", kind, "--verify")
    assert (found["type"], found["files"], found["bytes"]) == (kind, ["model.gguf"], out.stat().st_size)
    (parity,) = found["engines"]
    assert (parity["engine"], parity["passed"], parity["problem"]) == ("llama.cpp", True, None)
    assert (parity["error"] < 2e-3) == (kind == "f32")


def test_a_folder_can_be_exported_again(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts(capsys, run, str(tmp_path / "a"), "--to", "hf")
    facts(capsys, str(tmp_path / "a"), str(tmp_path / "b"), "--to", "hf")
    first, second = (load(tmp_path / name).model.state_dict() for name in "ab")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    facts(capsys, str(tmp_path / "a"), str(tmp_path / "c.gguf"), "--to", "gguf")


def test_a_difference_is_exit_code_1(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [Parity("transformers", "5", 64, 64, False, 1e-6), Parity("mlx-lm", problem="not installed: pip install x")]
    given: list[dict[str, Any]] = []

    def parities(*arguments: Any, **named: Any) -> list[Parity]:
        given.append(named)
        return told

    monkeypatch.setattr("fathom.verify.engines.parities", parities)
    assert main(["export", run, str(tmp_path / "a"), "--to", "hf", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "64 of 64" in out
    assert "mlx-lm: not installed: pip install x" in out
    assert given[0]["folder"] == tmp_path / "a"
    told[0] = Parity("transformers", "5", 3, 64, False, 0.5)
    found = facts(capsys, run, str(tmp_path / "b"), "--to", "hf", "--verify", code=1)
    assert [parity["passed"] for parity in found["engines"]] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "hf", "--type", "f16"], "--type cannot"),
        (["--to", "gguf", "--dtype", "float16", "--shard-size", "1GB"], "--dtype and --shard-size cannot"),
        (["--to", "hf", "--shard-size", "many"], "--shard-size is 'many'"),
        (["--to", "hf", "--family", "gpt2"], "possible are auto"),
        (["--to", "hf", "--family", "mixtral"], "MLA and not GQA"),
        (["--to", "hf", "--engine", "vllm"], "--verify"),
        (["--to", "hf", "--verify", "--engine", "gpt4"], "no engine gpt4"),
        (["--to", "gguf", "--verify", "--engine", "transformers"], "not asked about a GGUF"),
        (["--to", "onnx"], "onnx"),
        ([], "--to"),
    ],
)
def test_refusals(
    run: str, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", run, str(tmp_path / "out"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in " ".join((out + err).split())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_there_is_kept(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for to in ("hf", "gguf"):
        assert main(["export", run, str(tmp_path / "out"), "--to", to]) == 2
        assert "there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("text", "bytes_"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("77", 77)])
def test_sizes(text: str, bytes_: int) -> None:
    assert size(text) == bytes_


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "1XB", "0.1"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="shard-size"):
        size(text)
