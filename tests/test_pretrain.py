"""Both doors, with the real parts: a run is made, killed, taken up, opened."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fathom
from fathom.errors import CheckpointError, ConfigError, DataError, RequestError, UserError
from fathom.load import Run
from fathom.pretrain import differences
from fathom.train.checkpoint import RunFolder

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"
OF_TIME = {"tokens_per_second", "mfu", "seconds"}
SPEECH = "the union of the states and the people of the nation shall be one and the same before the law ."


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text of a few documents, quickly learnt."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = SPEECH.split()
    lines = [" ".join(words[(i * 7 + j * (1 + i % 3)) % len(words)] for j in range(60)) for i in range(120)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings(text: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "data.datasets": [{"kind": "text", "path": str(text), "documents": "line"}],
        "data.validation_fraction": 0.1,
        "training.output_dir": str(folder),
        "training.max_steps": 8,
        "training.logging_steps": 2,
        "training.eval_steps": 4,
        "training.save_steps": 3,
        "training.sample_frequency": 4,
        "training.sample_max_tokens": 6,
        "scheduler.warmup_steps": 2,
        "logging.progress": "quiet",
        "logging.hardware_seconds": 0,
        "hardware.precision": "float32",
        **more,
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in OF_TIME} for row in csv.DictReader(file)]


def assert_same(one: Path, other: Path, step: int) -> None:
    for name in ("metrics.csv", "experts.csv", "samples.csv"):
        assert table(one / name) == table(other / name), name
    a, b = RunFolder.open(one).at(step), RunFolder.open(other).at(step)
    for file in ("model.safetensors", "rng.safetensors"):
        assert (a.path / file).read_bytes() == (b.path / file).read_bytes(), file


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An unbroken run of eight steps."""
    return fathom.train(TINY, settings(text, tmp_path_factory.mktemp("run") / "whole"))


def test_a_run_folder_explains_itself(whole: Run) -> None:
    names = {p.name for p in whole.path.iterdir()}
    assert names >= {
        "run.json", "config.yaml", "hparams.yaml", "metrics.csv", "experts.csv", "samples.csv", "events.jsonl",
        "environment.json", "tokenizer", "checkpoints",
    }  # fmt: skip
    assert json.loads((whole.path / "run.json").read_text())["format"] == 1
    rows = table(whole.path / "metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert all(row["mtp_loss"] and row["balance_loss"] for row in rows)
    experts = table(whole.path / "experts.csv")
    assert {row["layer"] for row in experts} == {"1", "2"}  # layer 0 is dense; 2 is the MTP depth's
    assert len(experts) == 4 * 2 * 8
    assert any(float(row["bias"]) != 0 for row in experts)
    samples = table(whole.path / "samples.csv")
    assert [row["step"] for row in samples] == ["4", "8"]
    assert whole.metrics["val_loss"] == pytest.approx(float(rows[-1]["val_loss"]), rel=1e-5)
    assert "training.max_steps: 8" in (whole.path / "hparams.yaml").read_text()


def test_opening_gives_the_same_model(whole: Run) -> None:
    opened = fathom.load(whole.path)
    tokens = torch.tensor([opened.tokenizer.encode("the union of")])
    assert (opened.step, opened.model.training) == (8, False)
    assert torch.equal(opened.model(tokens), whole.model(tokens))
    assert opened.config == whole.config
    text = opened.generate("the union", max_tokens=5, temperature=0.9, seed=3)
    assert text == whole.generate("the union", max_tokens=5, temperature=0.9, seed=3)


def test_steps_and_best_are_found_by_name(whole: Run) -> None:
    folder = RunFolder.open(whole.path)
    assert fathom.load(f"{whole.path}@6").step == 6
    assert fathom.load(f"{whole.path}@best").step == folder.best().step
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; it has"):
        fathom.load(f"{whole.path}@5")
    with pytest.raises(CheckpointError, match="after @ comes best"):
        fathom.load(f"{whole.path}@worst")


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float13"), ("gpu", "float32")])
def test_unknown_devices_and_dtypes_are_named(whole: Run, device: str, dtype: str) -> None:
    with pytest.raises(ConfigError, match="possible are"):
        fathom.load(whole.path, device, dtype)


def test_unknown_sampling_options_are_named(whole: Run) -> None:
    with pytest.raises(RequestError, match="did you mean top_p"):
        whole.generate("the", topp=0.5)


def test_weights_on_disk_bear_the_names_of_hugging_face(whole: Run) -> None:
    names = load_file(RunFolder.open(whole.path).latest().path / "model.safetensors").keys()
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= names
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in names
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert "model.layers.2.eh_proj.weight" in names


def test_a_taken_folder_is_refused_and_left_alone(whole: Run, text: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.path.rglob("*")}
    with pytest.raises(CheckpointError, match="holds a run already"):
        fathom.train(TINY, settings(text, whole.path))
    assert {p: p.stat().st_mtime_ns for p in whole.path.rglob("*")} == before


def test_a_mistake_in_the_data_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        fathom.train(TINY, settings(tmp_path / "missing.txt", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size is 100, but the tokenizer has 257"):
        fathom.train(TINY, settings(text, tmp_path / "run", **{"model.vocab_size": 100}))
    assert not (tmp_path / "run").exists()


def test_a_run_without_held_out_text(text: Path, tmp_path: Path) -> None:
    run = fathom.train(
        TINY, settings(text, tmp_path / "run", **{"data.validation_fraction": 0, "data.test_fraction": 0})
    )
    assert "val_loss" not in run.metrics
    assert all(row["val_loss"] == "" for row in table(run.path / "metrics.csv"))


def test_resuming_in_the_middle_equals_not_stopping(whole: Run, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    fathom.train(TINY, settings(text, folder, **{"training.keep_last": None}))
    again = fathom.train(TINY, settings(text, tmp_path / "ignored"), resume=f"{folder}@3")
    assert again.path == folder
    assert not (tmp_path / "ignored").exists()
    assert_same(whole.path, folder, 8)


def test_a_finished_run_is_taken_up_without_harm(whole: Run, text: Path, tmp_path: Path) -> None:
    fathom.train(TINY, settings(text, tmp_path / "run"))
    done = fathom.train(TINY, settings(text, tmp_path / "run"), resume=tmp_path / "run")
    assert done.step == 8
    assert_same(whole.path, tmp_path / "run", 8)


def test_another_model_cannot_go_on(whole: Run, text: Path) -> None:
    with pytest.raises(ConfigError, match=r"another model: model.hidden_size was 48, is 64"):
        fathom.train(TINY, settings(text, whole.path, **{"model.hidden_size": 64}), resume=whole.path)
    with pytest.raises(CheckpointError, match="not a run folder"):
        fathom.train(TINY, settings(text, whole.path), resume=whole.path / "checkpoints")


def test_changes_on_resume_are_told(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("fathom"), "propagate", True)
    fathom.train(TINY, settings(text, tmp_path / "run", **{"training.max_steps": 4}))
    run = fathom.train(
        TINY, settings(text, tmp_path / "run", **{"training.max_steps": 6}), resume=str(tmp_path / "run")
    )
    assert "training.max_steps was 4, is 6" in caplog.text
    assert run.step == 6


def test_differences() -> None:
    assert differences({"a": {"b": 1, "c": [2]}}, {"a": {"b": 1, "c": [3]}, "d": 4}) == {
        "a.c": ([2], [3]),
        "d": (None, 4),
    }


def arguments(text: Path, folder: Path, **more: Any) -> list[str]:
    pairs = settings(text, folder, **more)
    return [f"{key}={json.dumps(value)}" for key, value in pairs.items()]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fathom", *words]


ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    )


def wait_for(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / f"step-{step}").exists():
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.005)


def test_kill_and_resume_by_the_command(text: Path, tmp_path: Path) -> None:
    words = ["train", str(TINY)]
    more = {"training.max_steps": 30, "training.save_steps": 5, "training.eval_steps": 7}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    unbroken = start([*words, *arguments(text, whole, **more), "--json"])
    killed = start([*words, *arguments(text, parts, **more)])
    wait_for(parts, 10)
    time.sleep(int.from_bytes(os.urandom(1), "big") / 1000)  # a moment that nobody chose
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    resumed = start([*words, *arguments(text, parts, **more), "--resume", str(parts), "--json"])
    for process in (unbroken, resumed):
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        last = json.loads(out.splitlines()[-1])
        assert (last["step"], "val_loss" in last) == (30, True)
    assert_same(whole, parts, 30)


def test_killed_before_its_first_checkpoint(whole: Run, text: Path, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    run = fathom.train(TINY, settings(text, tmp_path / "ignored"), resume=folder.path)
    assert run.step == 8
    assert_same(whole.path, folder.path, 8)


def test_sigterm_saves_and_says_how_to_go_on(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(["train", str(TINY), *arguments(text, folder, **{"training.max_steps": 100000})])
    wait_for(folder, 3)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert f"--resume {folder}" in out
    assert RunFolder.open(folder).latest().step > 3


RANK = """
import sys, json, torch
torch.set_num_threads(1)
import fathom
run = fathom.train(sys.argv[1], json.loads(sys.argv[2]))
"""


def test_two_ranks_make_the_run_of_one(whole: Run, text: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = json.dumps(settings(text, tmp_path / "two"))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(TINY), given],
            env={**os.environ, **ENVIRONMENT, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    one, two = table(whole.path / "metrics.csv"), table(tmp_path / "two" / "metrics.csv")
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)
        assert (a["val_loss"] == "") == (b["val_loss"] == "")
        if a["val_loss"]:
            assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-4)


@pytest.mark.parametrize(("precision", "recompute"), [("bfloat16", False), ("float16", False), ("float32", True)])
def test_other_arithmetic(text: Path, tmp_path: Path, precision: str, recompute: bool) -> None:
    more = {"hardware.precision": precision, "hardware.recompute": recompute, "training.max_steps": 4}
    run = fathom.train(TINY, settings(text, tmp_path / "run", **more))
    rows = table(run.path / "metrics.csv")
    assert float(rows[-1]["val_loss"]) < 5.6


def test_recomputation_changes_no_bit(whole: Run, text: Path, tmp_path: Path) -> None:
    run = fathom.train(TINY, settings(text, tmp_path / "run", **{"hardware.recompute": True}))
    assert_same(whole.path, run.path, 8)


def test_the_seed_of_the_description_runs(text: Path, tmp_path: Path) -> None:
    """config.yaml with everything but its size."""
    small = {
        "model.hidden_size": 32,
        "model.intermediate_size": 48,
        "model.moe.moe_intermediate_size": 48,
        "model.max_position_embeddings": 64,
        "training.sequence_length": 48,
        "training.sample_max_tokens": 4,
        "hardware.precision": "float16",
        "training.max_steps": 4,
    }
    given = settings(text, tmp_path / "run", **small)
    del given["scheduler.warmup_steps"]  # one_cycle has none
    run = fathom.train(ROOT / "config.yaml", given)
    rows = table(run.path / "samples.csv")
    assert len(rows) == 5
    assert float(table(run.path / "metrics.csv")[-1]["train_loss"]) < 11.2


def test_user_errors_have_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        command("train", str(TINY), f"data.datasets=[{{kind: text, path: {tmp_path / 'no.txt'}}}]",
                f"training.output_dir={tmp_path / 'run'}"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_every_user_error_is_one_family() -> None:
    assert issubclass(CheckpointError, UserError)


# --- a memory of n-grams ----------------------------------------------------------------


@pytest.fixture(scope="module")
def remembering(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("memory") / "run"
    return fathom.train(TINY, settings(text, folder, **MEMORY))


MEMORY: dict[str, Any] = {
    "tokenizer": {"kind": "character"}, "model.mtp.num_nextn_predict_layers": 0, "model.ngram": {"order": 5},
}  # fmt: skip


def test_a_memory_is_counted_saved_and_opened(remembering: Run, whole: Run) -> None:
    assert remembering.model.memory is not None
    assert float(table(remembering.path / "metrics.csv")[0]["train_loss"]) < 2.0  # what counting alone knows
    opened = fathom.load(remembering.path)
    tokens = torch.tensor([opened.tokenizer.encode("the union of")])
    assert torch.equal(opened.model(tokens), remembering.model(tokens))
    options = {"max_tokens": 5, "temperature": 0.9, "seed": 3}
    assert opened.generate("the union", **options) == remembering.generate("the union", **options)
    assert not (whole.path / "ngrams.safetensors").exists()


def test_a_run_with_a_memory_goes_on_as_if_it_had_not_stopped(remembering: Run, text: Path, tmp_path: Path) -> None:
    given = settings(text, tmp_path / "run", **MEMORY)
    fathom.train(TINY, given)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-8")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6", ignore_errors=True)
    fathom.train(TINY, given, resume=tmp_path / "run")
    a, b = RunFolder.open(remembering.path).at(8), RunFolder.open(tmp_path / "run").at(8)
    assert (a.path / "model.safetensors").read_bytes() == (b.path / "model.safetensors").read_bytes()


def test_a_memory_is_ours_alone(remembering: Run, tmp_path: Path) -> None:
    from fathom.hub.gguf import export_gguf
    from fathom.hub.huggingface import export, weights_of

    config, weights = remembering.model.config, weights_of(remembering.model)
    with pytest.raises(ConfigError, match=r"no other engine has a place for model\.ngram"):
        export(config, weights, tmp_path / "hf", remembering.tokenizer)
    with pytest.raises(ConfigError, match=r"no other engine has a place for model\.ngram"):
        export_gguf(config, weights, tmp_path / "x.gguf", remembering.tokenizer)
    assert not list(tmp_path.iterdir())


def test_too_many_tokens_for_a_memory_are_refused(text: Path, tmp_path: Path) -> None:
    given = settings(text, tmp_path / "run", **{**MEMORY, "tokenizer": {"kind": "bpe", "vocab_size": 1100}})
    with pytest.raises(ConfigError, match=r"at most 1,024 tokens"):
        fathom.train(TINY, {**given, "model.vocab_size": 1100})
