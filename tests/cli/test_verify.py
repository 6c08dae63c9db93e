"""`fathom verify`: the certificate on the terminal, as JSON, and as an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from disk_run import disk_run

from fathom.cli.main import main
from fathom.model.cost import Cost
from fathom.verify.engines import Parity


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("fathom.verify.certificate.LENGTH", 12)
    disk_run(tmp_path / "run")
    return str(tmp_path / "run")


def test_the_certificate(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["run"], found["step"], found["passed"], found["engines"]) == (run, 7, True, [])
    assert main(["verify", f"{run}@7"]) == 0
    out = capsys.readouterr().out
    assert all(check["name"] in out for check in found["checks"])
    assert "Everything holds." in out
    assert all(len(line) <= 80 for line in out.splitlines() if "run after step" not in line)


def test_what_does_not_hold_is_exit_code_1(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cost, "parameters", lambda self: 7)
    assert main(["verify", run]) == 1
    assert "NOT everything" in capsys.readouterr().out
    assert main(["verify", run, "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [check["name"] for check in found["checks"] if not check["passed"]] == ["parameters are as counted"]


def test_engines_count_too(run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = [Parity("mlx-lm", problem="not installed: pip install x", named=True)]
    monkeypatch.setattr("fathom.verify.engines.parities", lambda *given, **named: iter(told))
    assert main(["verify", run, "--engine", "mlx-lm"]) == 1
    assert "mlx-lm: not installed" in capsys.readouterr().out
    told[0] = Parity("mlx-lm", "0.32", 10, 10, False, 1e-6)
    assert main(["verify", run, "--engine", "all"]) == 0
    assert "10 of 10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--engine", "gpt4"], "no engine gpt4"), (["--engine", "vllm=x"], "no interpreter")]
)
def test_mistakes(run: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", run, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert main(["verify", f"{run}-no"]) == 2
    assert "no such folder" in capsys.readouterr().err
