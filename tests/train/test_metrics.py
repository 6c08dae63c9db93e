"""Tables: rows by hand, torn lines dropped, progress that a person can read."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_training import toy_trainer

from fathom.errors import DependencyError, TrainingError
from fathom.train.callbacks import LayerRouting, StepReport
from fathom.train.metrics import EXPERTS, METRICS, LoggingConfig, Metrics, WandbConfig, build_callbacks, clock
from fathom.train.monitor import COLUMNS, Monitor
from fathom.train.tables import Table


def report(step: int, loss: float, tokens: int = 10, **facts: Any) -> StepReport:
    given = {
        "max_steps": 100,
        "tokens_seen": 10 * step,
        "epoch": None,
        "mtp_tokens": (),
        "mtp_sums": (),
        "balance_loss": None,
        "lr": 0.1,
        "grad_norm": 1.0,
        "loss_scale": 1.0,
        "skipped": None,
        "seconds": 0.5,
        "elapsed": 2.0,
    }
    return StepReport(step=step, loss=loss, tokens=tokens, **{**given, **facts})


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logged(folder: Path, *reports: StepReport, every: int = 2, **named: Any) -> Metrics:
    own = Metrics(folder, every, **named)
    own.on_start(0, 100)
    for each in reports:
        own.on_step(each)
        own.on_step_end(each.step)
    return own


def test_a_row_is_a_mean_over_tokens_since_the_last(tmp_path: Path) -> None:
    logged(tmp_path, report(1, 2.0, tokens=30), report(2, 4.0, tokens=10), report(3, 9.0), report(4, 1.0))
    table = rows(tmp_path / "metrics.csv")
    assert list(table[0]) == METRICS
    assert [r["train_loss"] for r in table] == ["2.5", "5"]
    assert table[0]["tokens_per_second"] == "40"
    assert [table[0][k] for k in ("epoch", "val_loss", "val_bpb", "mtp_loss", "balance_loss", "mfu")] == [""] * 6


def test_mfu_and_mtp(tmp_path: Path) -> None:
    mtp = {"mtp_tokens": (8, 4), "mtp_sums": (16.0, 16.0), "balance_loss": 0.5}
    logged(tmp_path, report(1, 2.0, **mtp), report(2, 2.0, **mtp), flops_per_token=1e9, peak_flops=1e11)
    row = rows(tmp_path / "metrics.csv")[0]
    assert (row["mtp_loss"], row["balance_loss"], row["mfu"]) == ("3", "0.5", "0.2")


def test_a_skipped_step_leaves_no_mark_on_means(tmp_path: Path) -> None:
    bad = report(2, math.nan, skipped="loss not finite", grad_norm=math.inf, mtp_tokens=(5,), mtp_sums=(math.nan,))
    logged(tmp_path, report(1, 2.0, mtp_tokens=(5,), mtp_sums=(5.0,)), bad)
    row = rows(tmp_path / "metrics.csv")[0]
    assert (row["train_loss"], row["grad_norm"], row["mtp_loss"]) == ("2", "1", "1")


def test_an_evaluation_makes_a_row(tmp_path: Path) -> None:
    own = logged(tmp_path, every=50)
    own.on_step(report(7, 2.0))
    own.on_evaluation(7, SimpleNamespace(loss=1.5, bits_per_byte=None))
    own.on_step_end(7)
    assert [(r["step"], r["val_loss"], r["val_bpb"]) for r in rows(tmp_path / "metrics.csv")] == [("7", "1.5", "")]


def test_experts_by_hand(tmp_path: Path) -> None:
    one = LayerRouting((6, 2, 0, 0), 1, 1.0, (0.1, 0.2, 0.3, 0.4))
    two = LayerRouting((0, 2, 6, 0), 2, 0.5, (0.5, 0.6, 0.7, 0.8))
    logged(tmp_path, report(1, 1.0, routing={3: one}), report(2, 1.0, routing={3: two}))
    table = rows(tmp_path / "experts.csv")
    assert list(table[0]) == EXPERTS
    assert [(r["layer"], r["expert"], r["load"], r["bias"]) for r in table] == [
        ("3", "0", "0.375", "0.5"),
        ("3", "1", "0.25", "0.6"),
        ("3", "2", "0.375", "0.7"),
        ("3", "3", "0", "0.8"),
    ]
    assert {(r["max_vio"], r["entropy"], r["dead"], r["dropped"]) for r in table} == {("0.5", "0.75", "1", "3")}


def test_a_dense_model_has_no_expert_table(tmp_path: Path) -> None:
    logged(tmp_path, report(1, 1.0), report(2, 1.0))
    assert not (tmp_path / "experts.csv").exists()


@pytest.mark.parametrize("torn", ["", "4,bad", '4,"half a quo', "x,y\n", "9,late\n", "4,one,too many\n"])
def test_a_table_goes_on_after_its_checkpoint(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "t.csv"
    table = Table(path, ["step", "text"])
    table.add({"step": 1, "text": 'a "quote",\nand a line'}, {"step": 2, "text": None}, {"step": 3, "text": "past"})
    with path.open("a") as file:
        file.write(torn)
    Table(path, ["step", "text"], after_step=2).add({"step": 3, "text": "again"})
    assert rows(path) == [
        {"step": "1", "text": 'a "quote",\nand a line'},
        {"step": "2", "text": ""},
        {"step": "3", "text": "again"},
    ]


def test_events_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    own = logged(tmp_path)
    for step in (1, 2, 3):
        own.on_event(step, "checkpoint")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"step": 2, "ev')
    Metrics(tmp_path, 2).on_start(2, 9)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_table_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", ["step"])
    table.path = tmp_path / "no such folder" / "t.csv"
    with pytest.raises(TrainingError, match="cannot write"):
        table.add({"step": 1})


def test_lines_say_what_matters(tmp_path: Path) -> None:
    said: list[str] = []
    config = LoggingConfig(progress="lines", hardware_seconds=0)
    callbacks = build_callbacks(config, tmp_path, logging_steps=2, max_steps=4, say=said.append)
    trainer = toy_trainer(callbacks=callbacks, max_steps=4)
    trainer.run()
    assert said[0].startswith("step 2/4  loss ")
    assert "tok/s" in said[0]
    assert any("val " in line and line.startswith("step 4/4") for line in said)
    assert any("text of step 4 line two" in line for line in said)
    assert all("\n" not in line for line in said)


def test_auto_is_a_bar_only_on_a_terminal(tmp_path: Path) -> None:
    def kinds(on_terminal: bool, progress: str) -> list[str]:
        config = LoggingConfig(progress=progress)  # type: ignore[arg-type]
        found = build_callbacks(config, tmp_path, logging_steps=1, max_steps=2, on_terminal=on_terminal)
        return [type(c).__name__ for c in found] + [type(s).__name__ for s in found[0].sinks]  # type: ignore[attr-defined]

    assert kinds(True, "auto") == ["Metrics", "Monitor", "ProgressBar"]
    assert kinds(False, "auto") == ["Metrics", "Monitor", "Lines"]
    assert kinds(True, "quiet") == ["Metrics", "Monitor"]


def test_the_bar_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = LoggingConfig(progress="bar", hardware_seconds=0)
    callbacks = build_callbacks(config, tmp_path, logging_steps=2, max_steps=6, flops_per_token=1.0, peak_flops=1e9)
    toy_trainer(callbacks=callbacks, max_steps=6).run()
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "loss" in shown


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = LoggingConfig(progress="quiet", tensorboard=True, hardware_seconds=0)
    callbacks = build_callbacks(config, tmp_path, logging_steps=2, max_steps=4)
    toy_trainer(callbacks=callbacks, max_steps=4).run()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(DependencyError, match="pip install wandb"):
        build_callbacks(LoggingConfig(wandb=WandbConfig()), tmp_path, logging_steps=1, max_steps=1)


def test_hardware_is_sampled_and_the_thread_ends(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "hardware.csv", 0.01)
    monitor.on_start(0, 10)
    monitor.on_step(report(3, 1.0))
    deadline = time.monotonic() + 10
    while len(rows(tmp_path / "hardware.csv")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    monitor.on_end(3)
    table = rows(tmp_path / "hardware.csv")
    assert list(table[0]) == COLUMNS
    assert table[-1]["step"] == "3"
    assert float(table[-1]["process_bytes"]) > 1e6
    assert monitor.thread is not None
    assert not monitor.thread.is_alive()


def test_clock() -> None:
    assert [clock(s) for s in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]
