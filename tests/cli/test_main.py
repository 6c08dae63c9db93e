"""The command line as such: the table, the exit codes, and that help is quick."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fathom import __version__
from fathom.cli import main as cli
from fathom.cli.main import COMMANDS, main
from fathom.errors import DataError

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fathom", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def command_of(monkeypatch: pytest.MonkeyPatch, body: object) -> None:
    """Let `fathom plan` run a function of the test's own."""
    monkeypatch.setattr("fathom.cli.plan.command", body)


def test_help_names_every_command_without_torch() -> None:
    code = (
        "import sys\n"
        "from fathom.cli.main import main\n"
        "code = main(['--help'])\n"
        "heavy = [m for m in ('torch', 'numpy', 'pydantic', 'tokenizers', 'yaml') if m in sys.modules]\n"
        "print('CODE', code, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "CODE 0" in done.stdout, done.stderr
    assert "torch" not in done.stdout.splitlines()[-1]
    assert "numpy" not in done.stdout.splitlines()[-1]
    for name in COMMANDS:
        assert f" {name} " in done.stdout


def test_version_and_module() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"fathom {__version__}")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tokenizer", "train"] if name == "tokenizer" else [name]
    assert main([*arguments, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Example: fathom {' '.join(arguments)}" in " ".join(out.split())


def test_no_command_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) in (0, 2)  # click 8.1 and 8.2 differ
    assert "train" in capsys.readouterr().out + capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err
    assert main(["plan", "--nonsense"]) == 2


def test_a_mistake_of_the_user_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise DataError("there is no data.txt; [brackets] are no markup")

    command_of(monkeypatch, command)
    assert main(["plan"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: there is no data.txt; [brackets] are no markup\n")


def test_long_messages_are_not_wrapped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = "/".join(["folder"] * 60)

    def command() -> None:
        raise DataError(f"{path} is not there")

    command_of(monkeypatch, command)
    assert main(["plan"]) == 2
    assert f"error: {path} is not there\n" == capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise ZeroDivisionError

    command_of(monkeypatch, command)
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


def test_an_interrupt_is_130_and_an_exit_code_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def leaves() -> None:
        raise typer.Exit(7)

    command_of(monkeypatch, interrupted)
    assert main(["plan"]) == 130
    command_of(monkeypatch, leaves)
    assert main(["plan"]) == 7


def test_a_missing_file_from_the_shell() -> None:
    done = run("plan", "configs/latpop.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert "configs/laptop.yaml" in done.stderr.replace("\\", "/")


def test_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "data", "training", "base"} <= set(schema["properties"])
    assert main(["schema", "--output", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == schema
    assert main(["schema", "--output", str(tmp_path / "no" / "s.json")]) == 2


def test_opening_a_command_leaves_the_others_alone() -> None:
    code = (
        "import sys\nfrom fathom.cli.main import open_command\n"
        "open_command('schema')\nprint('fathom.cli.train' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
    assert cli.COMMANDS is COMMANDS
