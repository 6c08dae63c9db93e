"""Checkpoints: whole or not there, damage found by name, the last good one used, and a full disk survived."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import Toy, toy_trainer

from fathom.errors import CheckpointError
from fathom.hub.names import Names
from fathom.train import checkpoint as rooms
from fathom.train.checkpoint import RunFolder, write_whole

TOY = Path(__file__).with_name("toy_training.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 4, 8 and 12."""
    path = tmp_path_factory.mktemp("finished") / "run"
    toy_trainer(path, keep_last=None, keep_best=False).run()
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_what_a_checkpoint_holds(run: RunFolder) -> None:
    last = run.latest()
    assert last.step == 12
    names = [p.split("/")[0] for p in files(last.path)]
    assert set(names) == {"model.safetensors", "optimizer", "rng.safetensors", "trainer.json", "checksums.json"}
    sums = json.loads((last.path / "checksums.json").read_text())
    assert sorted([*sums, "checksums.json"]) == files(last.path)
    toy = Toy(seed=99)
    last.load_model(toy)
    assert toy.state_dict().keys() == last.model_state().keys()
    assert last.val_loss is not None
    assert run.at(8).val_loss is None  # evaluated at 5 and 10, not at 8


@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer/__0_0.distcp", "rng.safetensors", "trainer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_by_name_and_the_one_before_is_used(run: RunFolder, victim: str, damage: str) -> None:
    file = run.checkpoints / "step-12" / victim
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=victim):
        run.at(12)
    assert run.latest().step == 8


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model.safetensors": 3}', '{"trainer.json": {}}'])
def test_damaged_checksums(run: RunFolder, text: str) -> None:
    (run.checkpoints / "step-12" / "checksums.json").write_text(text)
    with pytest.raises(CheckpointError, match="step-12 is damaged"):
        run.at(12)
    assert run.latest().step == 8


def test_a_half_written_checkpoint_is_passed_over(run: RunFolder) -> None:
    (run.checkpoints / "step-12" / "checksums.json").unlink()
    shutil.copytree(run.checkpoints / "step-8", run.checkpoints / ".step-16.999")
    assert run.complete() == [4, 8]
    assert run.latest().step == 8
    run.prune(None, set())
    assert not list(run.checkpoints.glob(".*"))


def test_none_left_says_so(run: RunFolder) -> None:
    for step in (4, 8, 12):
        (run.checkpoints / f"step-{step}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only damaged checkpoints"):
        run.latest()
    assert run.begun


def test_find(run: RunFolder) -> None:
    assert [run.find(w).step for w in (None, "latest", "8", 4)] == [12, 12, 8, 4]
    assert run.find("best").step == 12
    for which, match in (("7", "no checkpoint of step 7; it has: 4, 8, 12"), ("worst", "after @ comes")):
        with pytest.raises(CheckpointError, match=match):
            run.find(which)


def test_best_is_the_lowest_and_is_kept(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5])
    trainer = toy_trainer(tmp_path / "run", max_steps=20, eval_steps=5, save_steps=5, keep_last=1)
    trainer.evaluate = lambda: type("E", (), {"loss": next(losses), "bits_per_byte": None})()
    trainer.run()
    assert trainer.folder is not None
    assert trainer.folder.complete() == [10, 20]
    assert trainer.folder.best().step == 10
    assert trainer.folder.best().val_loss == 1.0


def test_a_run_is_not_trained_over(run: RunFolder) -> None:
    with pytest.raises(CheckpointError, match=r"holds a run already.*--resume"):
        RunFolder.create(run.path)


@pytest.mark.parametrize("text", [None, "", "[]", '{"format": "1"}', '{"format": 2}'])
def test_what_is_no_run_is_not_opened(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError):
        RunFolder.open(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot begin a run"):
        RunFolder.create(tmp_path / "file" / "run")


def test_two_processes_do_not_share_a_run(run: RunFolder) -> None:
    held = run.lock()
    code = f"from fathom.train.checkpoint import RunFolder; RunFolder.open({str(run.path)!r}).lock()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process is training into" in out.stderr
    held.release()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_model_is_refused(run: RunFolder) -> None:
    toy = Toy()
    toy.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"missing \['extra.bias', 'extra.weight'\]"):
        run.latest().load_model(toy)


def test_names_on_disk_and_tensors_that_share_memory(tmp_path: Path) -> None:
    stack = torch.arange(24.0).reshape(2, 3, 4)
    names = Names(
        lambda state: {f"model.{e}": part for e, part in enumerate(state["stack"])} | {"copy": state["stack"]},
        lambda disk: {"stack": torch.stack([disk["model.0"], disk["model.1"]])},
    )
    run = RunFolder.create(tmp_path / "run")
    trainer = {"state": {"step": 1, "val_loss": None}}
    run.save(1, {"stack": stack}, {}, {"rank0.x": torch.ones(1)}, trainer, names)
    assert torch.equal(run.latest().model_state(names)["stack"], stack)
    assert run.latest().optimizer_state() == {}
    assert run.latest().rng_state(1) is None


@pytest.mark.parametrize("part", ["save_file", "_save_optimizer", "_sync"])
def test_a_full_disk_leaves_the_checkpoint_before(run: RunFolder, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rooms, part, full)
    before = {p: (run.path / p).read_bytes() for p in files(run.path)}
    with pytest.raises(CheckpointError, match="No space left on device; the checkpoint of step 12 stands"):
        run.save(16, {"a": torch.ones(3)}, {"b/c": torch.ones(2)}, {"d": torch.ones(1)}, {"state": {"step": 16}})
    assert {p: (run.path / p).read_bytes() for p in files(run.path)} == before


def test_a_file_that_may_not_grow_stops_the_run_with_a_message_and_loses_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: writes past the limit fail, as they do on a full disk, inside safetensors and torch alike."""
    pytest.importorskip("resource")
    path = tmp_path / "run"
    command = [sys.executable, str(TOY), str(path), "--max-steps", "8"]
    subprocess.run(command, check=True, capture_output=True)
    checkpoint = RunFolder.open(path).latest()
    before = {p: (checkpoint.path / p).read_bytes() for p in files(checkpoint.path)}
    largest = max(map(len, before.values()))
    resumed = [*command[:-1], "12", "--resume", "--limit", str(largest - 500)]
    out = subprocess.run(resumed, capture_output=True, text=True, check=False, timeout=120)
    assert out.returncode == 2, out.stderr
    assert "cannot write the checkpoint of step" in out.stdout
    assert "step 8 stands" in out.stdout
    assert "Traceback" not in out.stderr
    assert {p: (checkpoint.path / p).read_bytes() for p in files(checkpoint.path)} == before
    assert not [p for p in checkpoint.path.parent.iterdir() if p.name.startswith(".")]


def test_a_text_file_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "environment.json"
    write_whole(file, b"old")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rooms, "_sync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["environment.json"]
