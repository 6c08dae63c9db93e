"""What cannot be right is refused by name, and nothing is left half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_model
from safetensors.torch import load_file, save_file
from tiny_models import ATTENTIONS, MOES, tiny_model

from fathom.errors import CheckpointError, ConfigError
from fathom.hub.huggingface import choose, export, local_folder, pretrained, weights_of
from fathom.tokenizer.train import byte


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = random_model("deepseek_v3", 3, depths=1)
    export(model.config, weights_of(model), tmp_path / "out", shard_bytes=20_000)
    return tmp_path / "out"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    save_file({k: v for k, v in {**load_file(path), **changes}.items() if v is not None}, path)


def refused(folder: Path, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pretrained(folder)


def test_damaged_weights(folder: Path) -> None:
    files = shards(folder)
    assert len(files) > 3
    kept = files[1].read_bytes()
    for broken in (kept[: len(kept) // 2], kept[:5], b"PK\x03\x04 not this"):
        files[1].write_bytes(broken)
        refused(folder, CheckpointError, files[1].name)
    files[1].unlink()
    refused(folder, CheckpointError, f"{files[1].name} is missing")
    files[1].write_bytes(kept)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secrets.safetensors"}}')
    refused(folder, CheckpointError, "secrets")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, CheckpointError, "no index")


def test_index_and_files_must_agree(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"].pop(name)
    path.write_text(json.dumps(index))
    refused(folder, CheckpointError, name)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_opened(tmp_path: Path, pickled: str) -> None:
    (tmp_path / pickled).write_bytes(b"\x80\x04 cos\nsystem")
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    refused(tmp_path, CheckpointError, pickled)
    refused(tmp_path / pickled, CheckpointError, "pickled")


def single(tmp_path: Path, family: str = "deepseek_v3") -> Path:
    model = random_model(family, 3)
    export(model.config, weights_of(model), tmp_path / "one")
    return tmp_path / "one"


def test_other_tensors(tmp_path: Path) -> None:
    folder = single(tmp_path)
    path = folder / "model.safetensors"
    whole, name = load_file(path), "model.layers.1.self_attn.o_proj.weight"
    for changes, words in (
        ({name: None}, name),
        ({"model.layers.9.extra.weight": torch.zeros(2)}, "layers.9.extra"),
        ({name: whole[name][:, 1:].contiguous()}, name),
        ({name: whole[name].to(torch.int32)}, "I32"),
    ):
        change_tensors(path, **changes)
        refused(folder, CheckpointError, words)
        save_file(whole, path)
    assert pretrained(folder).config.hidden_size == 24


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "gpt2.*deepseek_v3"),
        ({"model_type": None}, "None"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "many"),
        ({"model_type": ["deepseek_v3"]}, "family"),
        ({"quantization_config": "fp8"}, "config.json"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": 0.5}}, "mscale"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_other_configurations(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = single(tmp_path)
    change_config(folder, **changes)
    refused(folder, ConfigError, words)


def test_no_config_and_no_folder(tmp_path: Path) -> None:
    folder = single(tmp_path)
    (folder / "config.json").write_text("[")
    refused(folder, ConfigError, "cannot be read")
    (folder / "config.json").unlink()
    refused(folder, ConfigError, "no config.json")
    refused(tmp_path / "nowhere", CheckpointError, "not a folder")
    with pytest.raises(CheckpointError, match="no folder"):
        local_folder(tmp_path / "nowhere")


def test_qwen_with_biases(tmp_path: Path) -> None:
    folder = single(tmp_path, "qwen2_moe")
    name = "model.layers.0.self_attn.k_proj.bias"
    change_tensors(folder / "model.safetensors", **{name: load_file(folder / "model.safetensors")[name] + 1})
    refused(folder, ConfigError, "k_proj.bias")


CANNOT = [
    ("deepseek_v3", "mla", "v2", "softmax"),
    ("deepseek_v2", "mla", "v3", "sigmoid"),
    ("deepseek_v2", "mla", "seed", "norm_topk_prob"),
    ("deepseek_v3", "gqa", "seed", "GQA"),
    ("deepseek_v3", "mla", {**MOES["v3"], "topk_method": "group_limited_greedy"}, "best two"),
    ("deepseek_v3", "mla", {**MOES["batch_loss"], "first_k_dense_replace": 0, "layers": [0]}, "leading"),
    ("qwen2_moe", "mla", "v3", "MLA"),
    ("qwen2_moe", "gqa", "batch_loss", "sigmoid"),
    ("mixtral", "gqa", {**MOES["seed"], "n_shared_experts": 1}, "shared"),
    ("mixtral", "gqa", {**MOES["seed"], "norm_topk_prob": False}, "divides"),
    ("ernie4_5_moe", "gqa", {**MOES["seed"], "routed_scaling_factor": 2.0}, "routed_scaling_factor"),
    ("ernie4_5_moe", "gqa", {**MOES["seed"], "n_group": 3, "topk_group": 2}, "groups"),
    ("mixtral", "gqa", "dense", "llama"),
    ("llama", "gqa", "seed", "qwen2_moe"),
    ("deepseek_v3", {**ATTENTIONS["mla_yarn"], "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 8,
                                                                "mscale": 0.0}}, "v3", "mscale"),
    ("gpt2", "mla", "v3", "possible are auto, deepseek_v3"),
    ("auto", "mla", "seed", "deepseek_v3 cannot.*\n.*deepseek_v2 cannot"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "attention", "moe", "words"), CANNOT)
def test_what_a_family_cannot_hold(tmp_path: Path, family: str, attention: Any, moe: Any, words: str) -> None:
    model = tiny_model(attention, moe, depths=0)
    with pytest.raises(ConfigError, match=words):
        export(model.config, weights_of(model), tmp_path / "out", family=family)
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_matters_needs_a_family_with_one() -> None:
    model = tiny_model("gqa", "seed", depths=0)
    assert choose(model.config, weights_of(model)).model_type == "qwen2_moe"
    model.layers[1].mlp.gate.e_score_correction_bias[2] = 0.1
    assert choose(model.config, weights_of(model)).model_type == "ernie4_5_moe"
    for family in ("qwen2_moe", "mixtral"):
        with pytest.raises(ConfigError, match="selection biases"):
            choose(model.config, weights_of(model), family)


def test_export_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("deepseek_v3", 1)
    weights, out = weights_of(model), tmp_path / "out"
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        export(model.config, weights, out, dtype="int4")
    with pytest.raises(ConfigError, match="257 tokens"):
        export(model.config, weights, out, byte())
    with pytest.raises(CheckpointError, match=r"without model\.norm\.weight"):
        export(model.config, {k: v for k, v in weights.items() if k != "model.norm.weight"}, out)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fathom.hub.huggingface._write_json", full)
        with pytest.raises(CheckpointError, match="No space left"):
            export(model.config, weights, out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    export(model.config, weights, out)
    before = sorted(out.iterdir())
    with pytest.raises(CheckpointError, match="there already"):
        export(model.config, weights, out)
    assert sorted(out.iterdir()) == before
    shutil.rmtree(out)
