"""`fathom import`: a Hugging Face folder becomes a run that does all that a run does."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_run import TEXT, disk_run

import fathom
from fathom.cli.main import main
from fathom.hub.huggingface import export, weights_of
from fathom.load import load
from fathom.tokenizer.ids import is_of_ids
from fathom.tokenizer.train import byte
from fathom.train.checkpoint import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = disk_run(tmp_path / "run")
    return export(model.config, weights_of(model), tmp_path / "hf", byte(), shard_bytes=20_000).folder


def facts(capsys: pytest.CaptureFixture[str], folder: Path, run: Path) -> dict[str, Any]:
    assert main(["import", str(folder), str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_weights_come_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, folder, tmp_path / "again")
    first, again, straight = (load(tmp_path / name) for name in ("run", "again", "hf"))
    for other in (again, straight):
        state = other.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in first.model.state_dict().items())
        assert other.generate("The people", max_tokens=9, temperature=0.0) == first.generate(
            "The people", max_tokens=9, temperature=0.0
        )
    assert (found["family"], found["tokenizer"], found["vocab_size"]) == ("deepseek_v3", True, 262)
    assert found["parameters"] == sum(weight.numel() for weight in first.model.parameters())
    assert again.step == 0
    assert again.config.model.attention == first.config.model.attention
    verify(tmp_path / "again" / "checkpoints" / "step-0")
    assert {path.suffix for path in (tmp_path / "again").rglob("*.*")} == {".json", ".yaml", ".safetensors"}
    assert json.loads((tmp_path / "again" / "run.json").read_text())["imported"] == str(folder)


def test_it_trains_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the weights that came, on a text of one's own, and can be resumed like any run."""
    run, text = tmp_path / "again", tmp_path / "text.txt"
    text.write_text(TEXT * 200)
    facts(capsys, folder, run)
    own = {
        "data.datasets": [{"kind": "text", "path": str(text), "documents": "line"}],
        "training.max_steps": 4,
        "training.sequence_length": 32,
        "training.logging_steps": 1,
        "training.eval_batches": 1,
        "scheduler.warmup_steps": 0,
        "optimizer.lr": 3e-3,
        "hardware.precision": "float32",
        "logging.progress": "quiet",
    }
    first = fathom.train(run / "config.yaml", {**own, "training.max_steps": 2}, resume=run)
    assert first.step == 2
    assert fathom.train(run / "config.yaml", own, resume=run).step == 4
    with (run / "metrics.csv").open(newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert len(losses) == 4
    assert losses[3] < losses[0]
    before = load(tmp_path / "run")
    ids = torch.tensor([before.tokenizer.encode(TEXT)[:33]])
    with torch.no_grad():
        start = torch.nn.functional.cross_entropy(before.model(ids[:, :-1])[0], ids[0, 1:])
    assert losses[0] == pytest.approx(float(start), rel=0.1)  # not from fresh weights


def test_a_model_without_a_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folder.glob("*token*.json"):
        path.unlink()
    assert main(["import", str(folder), str(tmp_path / "ids")]) == 0
    out, err = capsys.readouterr()
    assert "token ids only" in out
    assert "warning: " in err
    run, first = load(tmp_path / "ids"), load(tmp_path / "run")
    assert is_of_ids(run.tokenizer)
    prompt = first.tokenizer.encode("The people")
    told = run.generate(" ".join(map(str, prompt)), max_tokens=9, temperature=0.0)
    assert first.tokenizer.decode([int(word) for word in told.split()]) == first.generate(
        "The people", max_tokens=9, temperature=0.0
    )
    assert main(["generate", str(tmp_path / "ids"), "--prompt", "The people"]) == 2
    assert "numbers" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "ids")]) == 0
    assert main(["export", str(tmp_path / "ids"), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_the_end_of_text_is_the_one_that_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    keys = json.loads((folder / "config.json").read_text())
    for said, end in ((7, 7), ([9, 7], 9), (None, 261), (999, 261)):
        (folder / "config.json").write_text(json.dumps({**keys, "eos_token_id": said}))
        assert load(folder).tokenizer.eos_id == end


def test_an_exported_folder_is_opened(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run = load(folder, dtype="bfloat16")
    assert run.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(layer.gate.e_score_correction_bias.dtype == torch.float32 for layer in run.model.moe_layers().values())
    assert run.path == folder
    for arguments in (
        ["generate", str(folder), "-p", "The people", "--greedy", "--max-tokens", "3"],
        ["eval", str(folder), "--text", str(tmp_path / "text.txt"), "--sequence-length", "16"],
    ):
        assert main([*arguments, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out.splitlines()[-1]), dict)


def test_refusals_leave_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())

    def refused(source: object, target: str, words: str) -> None:
        assert main(["import", str(source), str(tmp_path / target)]) == 2
        assert words in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    refused(folder, "run", "there already")
    refused(tmp_path / "nowhere", "new", "no folder")
    weights = sorted(folder.glob("*.safetensors"))[0]
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    refused(folder, "new", weights.name)
    weights.write_bytes(whole)
    keys = (folder / "config.json").read_text()
    (folder / "config.json").write_text(keys.replace('"deepseek_v3"', '"gpt2"'))
    refused(folder, "new", "gpt2")
    (folder / "config.json").write_text(keys)


def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("fathom.hub.huggingface.write_shards", full)
    assert main(["import", str(folder), str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'new'}: No space left" in err
    assert "--resume" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
