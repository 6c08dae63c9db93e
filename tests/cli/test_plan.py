"""`fathom plan`: the promised numbers, and what it says to people."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fathom.cli.main import main
from fathom.cli.plan import MEMORY, amount, count, duration, facts, find_device
from fathom.errors import ConfigError
from fathom.recipe import load_config
from fathom.runtime.device import PEAKS

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "config.yaml", *sorted((ROOT / "configs").rglob("*.yaml"))]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, str(ROOT / "config.yaml"))
    assert (found["parameters"], found["active_parameters"]) == (84_466_688, 65_592_320)
    assert found["mtp_parameters"] == 0


@pytest.mark.parametrize(
    ("name", "billions", "active", "cache"),
    [("v2-lite", 15.706, 2.451, 31_104), ("v2", 235.741, 20.852, 69_120), ("v3", 671.026, 36.626, 70_272)],
)
def test_the_released_models(
    capsys: pytest.CaptureFixture[str], name: str, billions: float, active: float, cache: int
) -> None:
    found = plan(capsys, str(ROOT / "configs" / f"{name}.yaml"))
    assert round(float(str(found["parameters"])) / 1e9, 3) == billions
    assert round(float(str(found["active_parameters"])) / 1e9, 3) == active
    assert found["cache_bytes_per_token"] == cache
    by_kind = found["cache_bytes_per_token_by_attention"]
    assert isinstance(by_kind, dict)
    assert by_kind["mla"] == cache
    assert by_kind["mla"] < by_kind["gqa"] < by_kind["mha"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_parts_add_up(path: Path) -> None:
    found = facts(load_config(path), device="h100")
    parts = found["parameters_by_part"].values()
    assert sum(part["total"] for part in parts) == found["parameters"]
    assert sum(part["active"] for part in parts) == found["active_parameters"]
    memory = dict(found["training_memory"])
    assert memory.pop("total") == sum(memory.values())
    assert found["seconds"] == pytest.approx(found["tokens"] / found["tokens_per_second"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_page_fits_a_terminal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "84,466,688" in out or path.stem != "config"
    for word in ("Parameters", "Operations", "Cache", "Memory", "Time on H100", "tokens a second"):
        assert word in out
    assert "…" not in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_more_devices_are_faster_and_hold_fewer_rows() -> None:
    run = load_config(ROOT / "config.yaml")
    one, four = facts(run, 1, "a100"), facts(run, 4, "a100")
    assert four["seconds"] == pytest.approx(one["seconds"] / 4)
    assert (one["rows_per_device"], four["rows_per_device"]) == (4, 1)
    assert four["training_memory"]["activations"] < one["training_memory"]["activations"]
    assert four["training_memory"]["weights"] == one["training_memory"]["weights"]


def test_recomputation_takes_time_and_saves_memory() -> None:
    plain = facts(load_config(ROOT / "config.yaml"), device="h100")
    again = facts(load_config(ROOT / "config.yaml", ["hardware.recompute=true"]), device="h100")
    assert again["seconds"] == pytest.approx(plain["seconds"] * 4 / 3)
    assert again["training_memory"]["total"] < plain["training_memory"]["total"]


def test_overrides_and_this_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.num_hidden_layers=3", "model.moe=null", "hardware.precision=float32"]
    found = plan(capsys, str(ROOT / "config.yaml"), *small, "--device", "cpu", "--utilization", "1")
    assert found["parameters"] == found["active_parameters"] == 50257 * 512 + 3 * (655360 + 3 * 512 * 2048 + 1024) + 512
    assert found["precision"] == "float32"
    assert float(str(found["tokens_per_second"])) > 0


@pytest.mark.parametrize(("name", "known"), [(name, name) for name in PEAKS] + [("cpu", "cpu")])
def test_every_tabled_device_is_known(name: str, known: str) -> None:
    assert find_device(name) == known
    assert find_device(name.lower().replace(" ", "-")) == known
    assert name in MEMORY or name == "cpu"


@pytest.mark.parametrize(
    ("given", "known"), [("rtx4090", "RTX 4090"), ("NVIDIA H100", "H100"), ("GeForce RTX 3090", "RTX 3090")]
)
def test_devices_have_many_spellings(given: str, known: str) -> None:
    assert find_device(given) == known


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "h101"], ["--device h101", "did you mean h100", "rtx-4090", "cpu", "a100"]),
        (["--device", "abacus"], ["--device abacus", "possible are cpu"]),
        (["--device", "v100", "hardware.precision=bf16"], ["v100", "bfloat16", "float16"]),
        (["--world", "5"], ["--world is 5", "training.batch_size 4"]),
        (["model.vocab_size=null", "tokenizer.kind=character"], ["model.vocab_size", "character", "estimate"]),
        (["modle.x=1"], ["command line: modle", "did you mean model"]),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert main(["plan", str(ROOT / "config.yaml"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize("size", [("gpt2", 50257), ("byte", 257)])
def test_a_vocabulary_left_open_is_the_tokenizers(size: tuple[str, int]) -> None:
    kind, vocabulary = size
    run = load_config(ROOT / "config.yaml", ["model.vocab_size=null", f"tokenizer.kind={kind}"])
    assert facts(run)["vocab_size"] == vocabulary


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (count(671_026_404_352), "671.03B"),
        (count(15_706_484_224), "15.706B"),
        (count(84_466_688), "84.467M"),
        (count(1234), "1,234"),
        (count(14.798e12), "14.798T"),
        (amount(999, "B"), "999 B"),
        (amount(70_272, "B"), "70.3 kB"),
        (amount(3.86e24, "FLOP"), "3.86 YFLOP"),
        (duration(0.0042), "4.2 ms"),
        (duration(90), "90.0 s"),
        (duration(600), "10.0 min"),
        (duration(86400 * 78.4), "78.4 days"),
    ],
)
def test_numbers_for_people(said: str, wanted: str) -> None:
    assert said == wanted


def test_every_unknown_device_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=re.escape("did you mean rtx-4090?")):
        find_device("rtx-4091")
