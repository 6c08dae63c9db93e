"""Run folder -> tables: whole, torn, half and not at all."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import METRICS, NASTY, make_run, table

from fathom.errors import CheckpointError
from fathom.report.read import Hardware, Metrics, read, read_runs
from fathom.report.summary import late_load, late_steps, summarize, violation


def test_the_columns_are_those_that_training_writes() -> None:
    from fathom.train import checkpoint, metrics, monitor

    assert [f.name for f in fields(Metrics)] == metrics.METRICS
    assert [f.name for f in fields(Hardware)] == monitor.COLUMNS
    assert metrics.EXPERTS == ["step", "layer", "expert", "load", "bias", "max_vio", "entropy", "dead", "dropped"]
    assert metrics.SAMPLES == ["step", "prompt", "generated_text"]
    from fathom.report.read import FORMAT

    assert FORMAT == checkpoint.FORMAT


def test_a_run(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "a"))
    assert run.name == "a"
    assert run.metrics.step.tolist() == list(range(5, 61, 5))
    assert np.isfinite(run.metrics.val_loss).sum() == 3
    assert [layer.layer for layer in run.experts] == [1, 2, 3]
    layer = run.experts[1]
    assert layer.load.shape == layer.bias.shape == (12, 5)
    assert layer.load.sum(axis=1) == pytest.approx(1)
    assert layer.ratio.max(axis=1) - 1 == pytest.approx(layer.max_vio)
    assert run.samples[-1].text == NASTY.replace("\0", "\ufffd")
    assert run.samples[0].text == " strong\nat step 5."
    assert (run.events[0].kind, run.events[0].facts["grad_norm"]) == ("skipped: gradient spike", 88.0)
    assert run.environment["packages"]["wandb"] is None
    assert "n_routed_experts: 16" in run.config


def test_only_run_json_is_needed(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 1}')
    run = read(tmp_path)
    assert (run.experts, run.samples, run.events, run.config, run.environment) == ((), (), (), "", {})
    assert len(run.metrics.step) == len(run.hardware.step) == 0
    empty = {k: v for k, v in asdict(summarize(run)).items() if v is not None}
    assert empty == {"skipped_steps": 0, "resumes": 0}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.mkdir(), "has no run.json; give the folder that training.output_dir names"),
        (lambda p: p.write_text(""), "it is a file"),
        (lambda p: (p.mkdir(), (p / "run.json").write_text('{"format": 2}')), "knows up to 1; install a newer"),
        (lambda p: (p.mkdir(), (p / "run.json").write_text('{"format": true}')), "format True"),
        (lambda p: (p.mkdir(), (p / "run.json").write_text("[1]")), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "run.json").write_text('{"form')), "cannot be read"),
    ],
)
def test_what_is_no_run(tmp_path: Path, make: object, words: str) -> None:
    assert callable(make)
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path / "x")


def test_a_checkpoint_of_a_run_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    with pytest.raises(CheckpointError, match="leave out @"):
        read(f"{tmp_path / 'a'}@best")


def test_a_table_without_its_header(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "metrics.csv").write_text("5,6,7\n")
    with pytest.raises(CheckpointError, match=r"metrics\.csv is damaged"):
        read(run)


def test_columns_by_name(tmp_path: Path) -> None:
    """An older table has fewer columns, a newer one more."""
    run = make_run(tmp_path / "a")
    table(run / "metrics.csv", "step,new,train_loss", [[7, 1, 2.5], [3, None, None]])
    metrics = read(run).metrics
    assert metrics.step.tolist() == [3, 7]
    assert math.isnan(metrics.train_loss[0])
    assert metrics.train_loss[1] == 2.5
    assert np.isnan(metrics.lr).all()


def test_rows_that_cannot_be_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "a")
    width = METRICS.count(",")
    with (run / "metrics.csv").open("a") as file:
        file.write("65,1\n" + "70" + ",x" * width + "\n" + "75" + "," * width + "\n")
    with caplog.at_level(logging.WARNING, "fathom"):
        assert read(run).metrics.step[-2:].tolist() == [60, 75]
    assert "2 of 15 rows" in caplog.text


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["metrics.csv", "experts.csv", "samples.csv", "events.jsonl", "hardware.csv"]), data=st.data()
)
def test_cut_anywhere(torn_run: Path, name: str, data: st.DataObject) -> None:
    """A kill may end a table after any byte; what was written to its end is read, and nothing else."""
    file = torn_run / name
    content = file.read_bytes()
    end = data.draw(st.integers(0, len(content)))
    whole = read(torn_run)
    try:
        file.write_bytes(content[:end])
        try:
            cut = read(torn_run)
        except CheckpointError:
            pytest.fail(f"{name} cut after byte {end} is refused")
    finally:
        file.write_bytes(content)
    assert len(cut.metrics.step) <= len(whole.metrics.step)
    assert np.array_equal(cut.metrics.train_loss, whole.metrics.train_loss[: len(cut.metrics.step)])
    assert cut.samples == whole.samples[: len(cut.samples)]
    assert cut.events == whole.events[: len(cut.events)]
    for old, new in zip(whole.experts, cut.experts, strict=False):
        assert np.array_equal(new.load, old.load[: len(new.step), : new.experts])


@pytest.fixture(scope="module")
def torn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("torn") / "a", steps=15)


def test_a_step_with_half_its_experts_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    lines = (run / "experts.csv").read_text().splitlines(keepends=True)
    (run / "experts.csv").write_text("".join(lines[:-2]))
    experts = read(run).experts
    assert [len(layer.step) for layer in experts] == [12, 12, 11]


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name) for name in ("x/demo", "y/demo", "y/z")]
    assert [run.name for run in read_runs(paths)] == ["x/demo", "y/demo", "z"]
    with pytest.raises(CheckpointError, match="more than once"):
        read_runs([paths[0], os.path.relpath(paths[0])])


def test_the_summary(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", layers=())
    rows = [
        [10, 100, 0.1, 3.0, 3.2, None, None, None, 0.1, 1, 50, 0.2, 5],
        [20, 200, 0.2, 2.0, 2.2, 1.1, None, None, 0.1, 1, 70, 0.4, 9],
        [30, 300, 0.3, None, 2.4, 1.2, None, None, 0.1, 1, 900, None, 12],
    ]
    table(folder / "metrics.csv", METRICS, rows)
    table(
        folder / "experts.csv",
        "step,layer,expert,load,bias,max_vio,entropy,dead,dropped",
        [
            [s, 2, e, load, None, 0, 0, 0, 0]
            for s, loads in ((10, (1, 0)), (30, (0.25, 0.75)))
            for e, load in enumerate(loads)
        ],
    )
    run = read(folder)
    found = summarize(run)
    assert (found.step, found.tokens, found.seconds, found.train_loss) == (30, 300, 12, 2.0)
    assert (found.val_loss, found.best_val_loss, found.best_step) == (2.4, 2.2, 20)
    assert (found.val_bpb, found.best_val_bpb) == (1.2, 1.1)
    assert found.tokens_per_second == 70
    assert found.mfu == pytest.approx(0.3)
    assert (found.parameters, found.active_parameters) == (6_123_457, 3_456_789)
    assert (found.skipped_steps, found.resumes) == (1, 1)
    # 10 steps of (1, 0) and 20 of (0.25, 0.75) are (0.5, 0.5)
    assert late_load(run.experts[0]) == pytest.approx([0.5, 0.5])
    assert late_steps(run.experts[0]) == 30
    assert (found.max_vio, found.worst_layer, found.dead_experts) == (pytest.approx(0), 2, 0)
    assert violation(np.array([0.1, 0.3, 0.2])) == pytest.approx(0.5)


def test_resumes_that_events_tell(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    with (folder / "events.jsonl").open("a") as file:
        file.write("".join(json.dumps({"step": step, "event": "resumed"}) + "\n" for step in (3, 9)))
    assert summarize(read(folder)).resumes == 2
