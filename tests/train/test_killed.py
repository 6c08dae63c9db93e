"""A run that is killed and goes on ends with the weights, to the byte, and the tables of the run that was not."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import toy_trainer

from fathom.train.checkpoint import RunFolder

TOY = Path(__file__).with_name("toy_training.py")
OF_TIME = {"tokens_per_second", "mfu", "seconds"}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in OF_TIME} for row in csv.DictReader(file)]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    for name in ("metrics.csv", "experts.csv", "samples.csv"):
        assert table(one / name) == table(other / name), name
    a, b = RunFolder.open(one).at(step), RunFolder.open(other).at(step)
    for file in ("model.safetensors", "rng.safetensors"):
        assert (a.path / file).read_bytes() == (b.path / file).read_bytes(), file
    first, second = a.optimizer_state(), b.optimizer_state()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    for key in ("loader", "guard"):
        assert a.trainer[key] == b.trainer[key]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("break_at", [1, 4, 7])
def test_a_run_in_two_sessions(tmp_path: Path, kind: str, break_at: int) -> None:
    toy_trainer(tmp_path / "whole", kind=kind).run()
    first = toy_trainer(tmp_path / "parts", kind=kind, save_steps=break_at)
    steps = iter(range(99))
    stop = first.objective

    def until(*args: object, **named: object) -> object:
        if next(steps) >= 2 * break_at + 1:  # two micro-batches a step: in the middle of a step past the checkpoint
            raise KeyboardInterrupt
        return stop(*args, **named)  # type: ignore[arg-type]

    first.objective = until  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    toy_trainer(tmp_path / "parts", kind=kind, resume=True).run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)


def test_float16_with_its_loss_scale_goes_on_too(tmp_path: Path) -> None:
    guards = {"initial_loss_scale": 2.0**20, "scale_growth_interval": 3}
    for name in ("whole", "parts"):
        toy_trainer(tmp_path / name, dtype=torch.float16, guards=guards, max_steps=12, keep_last=None).run()
    (tmp_path / "parts" / "checkpoints" / "step-12").rename(tmp_path / "gone")
    toy_trainer(tmp_path / "parts", dtype=torch.float16, guards=guards, resume=4, max_steps=12, keep_last=None).run()
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)
    assert "overflow" in (tmp_path / "whole" / "events.jsonl").read_text()


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(TOY), str(folder), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_kill_minus_nine_at_random(tmp_path: Path) -> None:
    """Killed again and again at moments that nobody chose, in the middle of steps, rows and checkpoints."""
    chance = random.Random()  # unseeded on purpose: over time, every moment
    options = ("--max-steps", "40", "--save-steps", "3", "--pause", "0.002")
    assert start(tmp_path / "whole", *options).wait(120) == 0
    resume: tuple[str, ...] = ()
    moments = []
    for _ in range(3):
        process = start(tmp_path / "parts", *options, *resume)
        moments.append(chance.uniform(0.02, 0.25))
        time.sleep(moments[-1])
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        resume = ("--resume",)
    process = start(tmp_path / "parts", *options, "--resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, (moments, errors)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 40)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path / "run", "--max-steps", "100000", "--save-steps", "100000", "--pause", "0.01")
    time.sleep(0.4)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    last = RunFolder.open(tmp_path / "run").latest()
    assert last.step > 0
    assert last.trainer["loader"]["micro_index"] == 2 * last.step
    assert load_file(last.path / "model.safetensors")


def test_going_back_to_an_earlier_checkpoint_drops_the_later_ones(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", keep_last=None).run()
    back = toy_trainer(tmp_path / "run", resume=4, keep_last=None)
    back.config = back.config.model_copy(update={"max_steps": 6})
    back.run()
    assert RunFolder.open(tmp_path / "run").complete() == [4, 5, 6]
    assert [row["step"] for row in table(tmp_path / "run" / "metrics.csv")] == ["3", "5", "6"]
