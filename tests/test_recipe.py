"""The whole tree: every YAML file in the repository, the seed's values, and what sections must agree on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.config.file import read
from fathom.config.parse import parse
from fathom.config.schema import json_schema
from fathom.config.shape import addresses
from fathom.config.text import dump
from fathom.errors import ConfigError
from fathom.recipe import SYNONYMS, RunConfig, load_config

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "config.yaml", *sorted((ROOT / "configs").rglob("*.yaml"))]
SMALL = "data: {datasets: [{kind: embedded}]}\n"


def complaint(folder: Path, text: str) -> str:
    (folder / "t.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(folder / "t.yaml")
    return str(caught.value).replace(str(folder / "t.yaml"), "t.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads_and_its_dump_loads_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(dump(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_obeys_the_json_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(read(path).plain(), json_schema(RunConfig))
    jsonschema.validate(load_config(path).model_dump(mode="json"), json_schema(RunConfig))


def test_every_output_folder_is_its_own() -> None:
    folders = [load_config(path).training.output_dir for path in FILES]
    assert len(set(folders)) == len(folders)


def test_the_seed_is_as_it_was_described() -> None:
    seed = load_config(ROOT / "config.yaml").model_dump(mode="json")
    model, training = seed["model"], seed["training"]
    assert [model[key] for key in ("vocab_size", "hidden_size", "intermediate_size")] == [50257, 512, 2048]
    assert [model[key] for key in ("num_hidden_layers", "max_position_embeddings", "hidden_act")] == [8, 512, "silu"]
    assert (model["rms_norm_eps"], model["tie_word_embeddings"]) == (1e-5, True)
    heads = model["attention"]
    assert (heads["kind"], heads["num_attention_heads"], heads["num_key_value_heads"]) == ("gqa", 8, 2)
    moe = model["moe"]
    assert (moe["layers"], moe["n_routed_experts"], moe["num_experts_per_tok"]) == ([2, 4, 6], 4, 2)
    assert (moe["capacity_factor"], moe["n_shared_experts"]) == (2.0, 0)
    assert (moe["scoring_func"], moe["norm_topk_prob"], moe["balance"]["kind"]) == ("softmax", True, "loss_free")
    assert model["mtp"]["num_nextn_predict_layers"] == 0
    assert seed["tokenizer"] == {"kind": "gpt2"}
    source = seed["data"]["datasets"][0]
    assert [source[key] for key in ("kind", "path", "subset")] == ["hub", "Salesforce/wikitext", "wikitext-103-raw-v1"]
    assert (source["split_ratio"], source["validation_split"]) == (0.01, "validation")
    optimizer, scheduler = seed["optimizer"], seed["scheduler"]
    assert (optimizer["kind"], optimizer["lr"], optimizer["weight_decay"]) == ("adamw", 1e-3, 0.01)
    assert optimizer["betas"] == [0.9, 0.95]
    assert (scheduler["kind"], scheduler["pct_start"]) == ("one_cycle", 0.02)
    assert (scheduler["div_factor"], scheduler["final_div_factor"]) == (25.0, 1000.0)
    assert (training["max_steps"], training["batch_size"], training["gradient_accumulation_steps"]) == (10000, 4, 2)
    assert (training["sequence_length"], training["save_steps"], training["sample_frequency"]) == (512, 500, 200)
    assert len(training["sample_prompts"]) == 5
    assert (seed["hardware"]["precision"], seed["hardware"]["gradient_clip"]) == ("float16", 1.0)


def test_synonyms_lead_to_keys_that_exist() -> None:
    known = {".".join(path) for path, _ in addresses(RunConfig)}
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (
            "training: {sequence_length: 1024}\n",
            "t.yaml:2: training.sequence_length: training.sequence_length is 1024, more than",
        ),
        (
            "model: {max_position_embeddings: 256}\n",
            "t.yaml:2: model.max_position_embeddings: training.sequence_length is 512",
        ),
        (
            "model: {mtp: {num_nextn_predict_layers: 7}}\ntraining: {sequence_length: 7}\n",
            "t.yaml:2: model.mtp.num_nextn_predict_layers: model.mtp.num_nextn_predict_layers is 7, but a row has",
        ),
        (
            "model: {vocab_size: 300}\ntokenizer: {kind: bpe, vocab_size: 301}\n",
            "t.yaml:2: model.vocab_size: model.vocab_size is 300, but tokenizer.vocab_size asks for 301",
        ),
        (
            "model: {moe: {first_k_dense_replace: 8}}\n",
            "t.yaml:2: model.moe: model.moe describes experts, but none of the 8",
        ),
        (
            "training: {sample_frequency: 5}\n",
            "t.yaml:2: training.sample_frequency: training.sample_frequency is 5, but",
        ),
        (
            "training: {sample_frequency: 5, sample_prompts: [a], sample_max_tokens: 512}\n",
            "t.yaml:2: training.sample_max_tokens: training.sample_max_tokens is 512, which leaves no room",
        ),
        (
            "model: {attention: {kind: gqa, num_attention_heads: 7, num_key_value_heads: 7}}\n",
            "t.yaml:2: model.attention.num_attention_heads: hidden_size is 512, which 7 attention heads do not divide",
        ),
        (
            "model: {attention: {kind: gqa, num_attention_heads: 8, num_key_value_heads: 3}}\n",
            "t.yaml:2: model.attention.num_key_value_heads: num_key_value_heads is 3, which does not divide",
        ),
        (
            "model: {moe: {layers: [8]}}\n",
            "t.yaml:2: model.moe.layers: moe.layers names [8], but num_hidden_layers is 8",
        ),
        (
            "model:\n  moe:\n    n_routed_experts: 4\n    num_experts_per_tok: 5\n",
            "t.yaml:5: model.moe.num_experts_per_tok: num_experts_per_tok is 5, more than the 4 of n_routed_experts",
        ),
        ("model: {n_layers: 3}\n", "t.yaml:2: model.n_layers: unknown key; did you mean model.num_hidden_layers?"),
        ("training: {learning_rate: 3}\n", "t.yaml:2: training.learning_rate: unknown key; did you mean optimizer.lr?"),
        (
            "optimizer: {kind: adam}\n",
            "t.yaml:2: optimizer: there is no kind: adam; possible are adamw | muon; did you mean adamw?",
        ),
        ("hardware: {precision: fp8}\n", "t.yaml:2: hardware.precision: given the text 'fp8'; must be auto | float32"),
    ],
)
def test_sections_that_do_not_agree(tmp_path: Path, text: str, start: str) -> None:
    assert complaint(tmp_path, SMALL + text).startswith(start)


def test_what_must_be_said_is_only_the_data(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(SMALL)
    assert load_config(tmp_path / "t.yaml").model.hidden_size == 512
    (tmp_path / "t.yaml").write_text("model: {hidden_size: 256}\n")
    with pytest.raises(ConfigError, match="data: is missing"):
        parse(read(tmp_path / "t.yaml"), RunConfig)


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        (["hardware.precision=16-mixed"], "float16"),
        (["hardware.precision=16"], "float16"),
        (["hardware.precision=bf16"], "bfloat16"),
    ],
)
def test_precision_has_many_names(tmp_path: Path, overrides: list[str], precision: str) -> None:
    (tmp_path / "t.yaml").write_text(SMALL)
    assert load_config(tmp_path / "t.yaml", overrides).hardware.precision == precision
