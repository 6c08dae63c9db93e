"""Trained models in the engines that the tests always have, and what is said of others."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

import fathom
from fathom.errors import ConfigError
from fathom.hub.gguf import export_gguf
from fathom.hub.huggingface import export, weights_of
from fathom.load import Run
from fathom.tokenizer.train import byte
from fathom.verify import engines
from fathom.verify.engines import (
    ENGINES,
    Chosen,
    Continuation,
    Parity,
    ask,
    chosen,
    compared,
    continued,
    known,
    last_words,
    letter_of,
    parities,
    prompts_for,
)

pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL: dict[str, dict[str, Any]] = {
    "tiny": {"training.max_steps": 12},
    "portable": {
        "training.max_steps": 6, "training.batch_size": 4, "model.hidden_size": 64, "model.intermediate_size": 96,
        "model.num_hidden_layers": 2, "tokenizer.vocab_size": 300,
    },
}  # fmt: skip


def trained(name: str, place: Path) -> Run:
    """A preset, shrunk, after a few steps on a small text; the tokenizer too is trained on it where it is a BPE."""
    (place / "text.txt").write_text("the people of the united states and the state of the union\n" * 300)
    everywhere = {
        "data.datasets": [{"kind": "text", "path": str(place / "text.txt"), "documents": "line"}],
        "training.output_dir": str(place / name),
        "training.sequence_length": 32,
        "training.sample_frequency": None,
        "training.eval_batches": 1,
        "scheduler.warmup_steps": 2,
        "hardware.precision": "float32",
        "logging.progress": "quiet",
    }
    return fathom.train(CONFIGS / f"{name}.yaml", {**everywhere, **SMALL[name]})


@pytest.mark.parametrize("name", SMALL)
def test_the_same_64_tokens_in_transformers_and_llama_cpp(name: str, tmp_path: Path) -> None:
    run = trained(name, tmp_path)
    found = list(parities(run.model, run.tokenizer, chosen(["transformers", "llama.cpp"])))
    assert [parity.engine for parity in found] == ["transformers", "llama.cpp"]
    for parity in found:
        assert parity.problem is None
        assert parity.tokens == 3 * 64
        assert parity.same == parity.tokens or parity.tied
        assert parity.error is not None
        assert 0 < parity.error < 2e-4
        assert parity.passed


def test_another_model_is_told(tmp_path: Path) -> None:
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "scoring_func": "sigmoid"}
    keys = {"vocab_size": 262, "max_position_embeddings": 64}
    model, other = (tiny_model("mla", moe, 0, seed, **keys).eval() for seed in (0, 1))
    file = export_gguf(other.config, weights_of(other), tmp_path / "other.gguf", byte(), kind="f32")
    (parity,) = parities(model, byte(), chosen(["llama.cpp"]), gguf=file, length=8)
    assert parity.version
    assert not parity.passed
    assert parity.error is not None
    assert parity.error > 0.1
    (narrow,) = parities(model, byte(), chosen(["llama.cpp"]), gguf=file, length=8, allowed=None)
    assert narrow.passed  # told, and not judged


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mla", "v3", 0, vocab_size=262).eval()
    monkeypatch.setattr(engines, "find_spec", lambda module: None)
    found = list(parities(model, byte(), chosen([]), length=2))
    assert [parity.engine for parity in found] == list(ENGINES)
    assert all(parity.passed for parity in found)
    assert all("not installed: " in str(parity.problem) for parity in found)
    assert "fathom-lm[verify]" in str(found[2].problem)
    assert "--engine vllm=PYTHON" in str(found[3].problem)
    (asked,) = parities(model, byte(), chosen(["mlx-lm"]), length=2)
    assert not asked.passed


def test_another_interpreter_says_for_itself(tmp_path: Path) -> None:
    job = {"engine": "vllm", "path": str(tmp_path), "prompts": [[1]], "length": 1, "best": 1, "letter": 0}
    if engines.find_spec("vllm") is None:
        assert ask(sys.executable, job, tmp_path) == ({"missing": "vllm"}, None)
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\necho 'ValueError: of this size I have nothing' >&2\nexit 3\n")
    silent.chmod(0o755)
    assert ask(str(silent), job, tmp_path) == ({}, "it stopped: ValueError: of this size I have nothing")
    model = tiny_model("mla", "v3", 0, vocab_size=262).eval()
    (parity,) = parities(model, byte(), chosen([f"vllm={silent}"]), length=2)
    assert (parity.passed, parity.version) == (False, None)


def test_what_cannot_be_exported_is_said() -> None:
    model = tiny_model("mla", "seed", 0, vocab_size=262).eval()
    found = list(parities(model, byte(), [Chosen(ENGINES["transformers"]), Chosen(ENGINES["llama.cpp"])], length=2))
    assert all("cannot be exported" in str(parity.problem) and parity.passed for parity in found)


def test_what_is_known_to_stop_an_engine(tmp_path: Path) -> None:
    model = tiny_model("mla_low_rank", "v3", 1).eval()
    export(model.config, weights_of(model), tmp_path / "hf")
    assert "export without MTP" in known(ENGINES["mlx-lm"], tmp_path / "hf")
    assert "multiples of 32" in known(ENGINES["vllm"], tmp_path / "hf")
    assert known(ENGINES["llama.cpp"], tmp_path / "hf") == ""


def test_last_words() -> None:
    said = "Traceback\n  File x\nValueError: the width is odd\n(EngineCore) shutting down\n"
    assert last_words(said, 1) == "ValueError: the width is odd"
    assert last_words("loading\nggml.c:12: GGML_ASSERT(n > 0) failed\nbye", -6) == (
        "ggml.c:12: GGML_ASSERT(n > 0) failed (signal 6)"
    )
    assert last_words("[rank0]: NotImplementedError: no\n", 1) == "NotImplementedError: no"
    assert last_words("", 1) == "nothing was said"


def test_engines_have_names(tmp_path: Path) -> None:
    assert [each.engine.name for each in chosen([])] == list(ENGINES)
    assert not any(each.named for each in chosen(["all"]))
    mixed = chosen(["all", f"vllm={sys.executable}"])
    assert [each.named for each in mixed] == [False, False, False, True]
    assert chosen(["mlx-lm"])[0].python == sys.executable
    with pytest.raises(ConfigError, match=r"gpt4.*llama\.cpp"):
        chosen(["gpt4"])
    with pytest.raises(ConfigError, match="no interpreter"):
        chosen([f"vllm={tmp_path}"])


def test_ours_is_the_greedy_continuation() -> None:
    model = tiny_model("mla_low_rank", "v3", 0).eval()
    run = continued(model, [3, 1, 4], 9)
    text = torch.tensor([[3, 1, 4, *run.tokens]])
    with torch.no_grad():
        rows = model(text)[0, 2:-1].log_softmax(-1)
    assert rows.argmax(-1).tolist() == run.tokens
    assert float((rows - run.logprobs).abs().max()) < 1e-4


def test_prompts_leave_room() -> None:
    model = tiny_model("mla", "v3", 0, vocab_size=262, max_position_embeddings=8).eval()
    assert all(0 < len(prompt) <= 2 for prompt in prompts_for(model, byte()))
    assert len(prompts_for(model, None)) == 2
    letter = byte().token_bytes[letter_of(byte())]
    assert len(letter) == 1
    assert letter.isalpha()


def test_comparing() -> None:
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.2, 0.2, 0.6]]).log()
    ours = [Continuation([0], [0, 0, 2], rows)]

    def theirs(tokens: list[int], off: float) -> list[dict[str, Any]]:
        told = [[[i, float(value) + off] for i, value in enumerate(row)] for row in rows]
        return [{"tokens": tokens, "logprobs": told}]

    same, tied, error = compared(ours, theirs([0, 0, 2], 0.25))
    assert (same, tied) == (3, False)
    assert error == pytest.approx(0.25)
    assert compared(ours, theirs([0, 1, 0], 0.0))[:2] == (1, True)
    assert compared(ours, theirs([1, 1, 0], 0.0))[:2] == (0, False)
    nothing = [{"tokens": [0, 0, 2], "logprobs": [[], [], [[1, float("-inf")]]]}]
    assert compared(ours, nothing) == (3, False, None)


def test_verdicts() -> None:
    good = Parity("x", "1", 64, 64, False, 1e-5)
    assert good.passed
    assert replace(good, same=63, tied=True).passed
    for bad in ({"same": 63}, {"error": 1.0}, {"error": None}, {"error": float("nan")}):
        assert not replace(good, **bad).passed, bad
    json.loads(json.dumps(replace(good, error=float("nan")).facts(), allow_nan=False))
