"""GGUF files give llama.cpp the same model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp import Llama, wrong_by
from tiny_models import ATTENTIONS, MOES, tiny_model, tokens_of
from tokenizers import pre_tokenizers

from fathom.errors import CheckpointError, ConfigError, DependencyError
from fathom.hub.gguf import export_gguf
from fathom.hub.huggingface import weights_of
from fathom.hub.pre import pre_tokenizer
from fathom.model.transformer import Transformer
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.tokenizer.train import byte, character, deepseek, gpt2, train_bpe

gguf = pytest.importorskip("gguf")

YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.707, "mscale_all_dim": 0.707}
V3 = MOES["v3"]
V2 = {**MOES["v2"], "n_group": 1, "topk_group": 1} if MOES["v2"] else None
SPARSE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CASES: dict[str, tuple[Any, Any]] = {
    "V3": ("mla_low_rank", V3),
    "V3 direct queries": ("mla", V3),
    "V3 without groups or shared experts": ("mla", {**V3, "n_group": 1, "topk_group": 1, "n_shared_experts": 0}),
    "V3 YaRN": ({**ATTENTIONS["mla_low_rank"], "rope_scaling": YARN}, V3),
    "V3 one expert a token": ("mla", {**V3, "num_experts_per_tok": 1}),
    "V3 weights not renormalised": ("mla", {**V3, "norm_topk_prob": False}),
    "V2": ("mla", V2),
    "dense MLA": ("mla_low_rank", None),
    "Llama": ("gqa", None),
    "Llama YaRN": ({**ATTENTIONS["gqa"], "rope_scaling": {**YARN, "mscale": 1.0}}, None),
    "Mixtral": ("mqa", {**SPARSE, "layers": [0]}),
    "Ernie": ("gqa", {**SPARSE, "layers": [0], "n_shared_experts": 2}),
    "Ernie leading dense": ("gqa", {**SPARSE, "first_k_dense_replace": 1, "n_shared_experts": 1}),
}


def made(attention: Any, moe: Any, depths: int = 0, **changes: Any) -> Transformer:
    """A model with biases that choose, wherever it may have some."""
    model = tiny_model(attention, moe, depths, vocab_size=262, max_position_embeddings=64, **changes)
    held = model.config.moe is not None and (
        model.config.moe.scoring_func == "sigmoid" or model.config.moe.n_shared_experts
    )
    for layer in model.moe_layers().values():
        if held and moe is not V2:
            layer.gate.e_score_correction_bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(layer.layer))
    return model.eval()


def prompts(vocabulary: int = 262) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(257, (n,), generator=generator).tolist() for n in (1, 2, 7, 19, 40)]


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_the_same_probabilities(name: str, tmp_path: Path) -> None:
    model = made(*CASES[name])
    file = export_gguf(model.config, weights_of(model), tmp_path / "m.gguf", byte(), kind="f32")
    assert wrong_by(model, Llama(file), prompts()) < 2e-4


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.1)])
def test_narrow_types_are_near(kind: str, tolerance: float, tmp_path: Path) -> None:
    attention = {"kind": "mla", "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
                 "qk_rope_head_dim": 32, "v_head_dim": 32}  # fmt: skip
    moe = {**SPARSE, "moe_intermediate_size": 32, "scoring_func": "sigmoid", "num_experts_per_tok": 4}
    model = made(attention, moe, hidden_size=64, intermediate_size=64, initializer_range=0.1)
    file = export_gguf(model.config, weights_of(model), tmp_path / "m.gguf", byte(), kind=kind)
    wrong = wrong_by(model, Llama(file), prompts())
    assert 1e-5 < wrong < tolerance
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == kind.upper()
    assert {kinds["output_norm.weight"], kinds["blk.0.ffn_gate_inp.weight"], kinds["blk.0.exp_probs_b.bias"]} == {"F32"}


def test_rows_that_do_not_fit_q8_stay_f16(tmp_path: Path) -> None:
    model = made("mla", V3)
    file = export_gguf(model.config, weights_of(model), tmp_path / "m.gguf", byte(), kind="q8_0")
    assert {t.tensor_type.name for t in gguf.GGUFReader(file).tensors} == {"F32", "F16"}
    assert wrong_by(model, Llama(file), prompts()) < 0.05


def test_mtp_travels_as_nextn(tmp_path: Path) -> None:
    moe = {**V3, "n_group": 1, "topk_group": 1}
    model = made("mla_low_rank", moe, depths=1)
    plain = export_gguf(model.config, weights_of(model), tmp_path / "plain.gguf", byte(), kind="f32")
    drafting = export_gguf(model.config, weights_of(model), tmp_path / "mtp.gguf", byte(), kind="f32", mtp=True)
    reader = gguf.GGUFReader(drafting)
    assert int(reader.fields["deepseek2.nextn_predict_layers"].parts[-1][0]) == 1
    assert int(reader.fields["deepseek2.block_count"].parts[-1][0]) == 3
    named = {t.name for t in reader.tensors}
    assert {f"blk.2.nextn.{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "shared_head_norm")} <= named
    assert not any("nextn" in t.name for t in gguf.GGUFReader(plain).tensors)
    prompt = tokens_of(1, 5)[0].tolist()
    drafted = Llama(drafting, draft=True).text(prompt, 20)
    assert drafted["choices"][0]["text"] == Llama(plain).text(prompt, 20)["choices"][0]["text"]
    assert drafted["timings"]["draft_n"] > 0


@cache
def deepseek_once() -> Tokenizer:
    return deepseek()


TEXT = "It's 1789:  the State of the Union,\n\n  über 12345 naïve — people'll agree!"


def test_splitting_rules_have_names() -> None:
    assert [pre_tokenizer(made()) for made in (gpt2, byte, deepseek_once)] == ["gpt-2", "gpt-2", "deepseek-v3"]
    assert pre_tokenizer(character(["abc"])) is None
    spaced = train_bpe([TEXT], 260)
    spaced.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert pre_tokenizer(spaced) is None


@pytest.mark.parametrize("name", ["deepseek", "trained", "byte"])
def test_text_becomes_the_same_tokens(name: str, tmp_path: Path) -> None:
    def trained() -> Tokenizer:
        return train_bpe([TEXT, "the people of the United States " * 3], 300, min_frequency=1)

    tokenizer = {"deepseek": deepseek_once, "trained": trained, "byte": byte}[name]()
    model = tiny_model("mla", V3, 0, vocab_size=tokenizer.vocab_size + 3, max_position_embeddings=128).eval()
    judge = Llama(export_gguf(model.config, weights_of(model), tmp_path / "m.gguf", tokenizer, kind="f32"))
    with torch.no_grad():
        ours = model(torch.tensor([tokenizer.encode(TEXT)]))[0, -1].log_softmax(-1)
    top = judge.next(TEXT, len(ours), best=200)
    seen = top.isfinite()
    assert int(seen.sum()) >= 50
    assert float((ours - top)[seen].abs().max()) < 2e-4


@pytest.mark.parametrize(
    ("attention", "moe", "words"),
    [
        ("mla", MOES["v2"], "best one|best two|best expert"),
        ("mla", MOES["seed"], "norm_topk_prob"),
        ("gqa", {**SPARSE, "scoring_func": "sigmoid"}, "sigmoid"),
        ("gqa", {**SPARSE, "norm_topk_prob": False}, "divides"),
        ({**ATTENTIONS["mla"], "rope_scaling": {**YARN, "mscale": 1.0}}, V3, "mscale_all_dim"),
    ],
)
def test_what_llama_cpp_has_no_word_for(attention: Any, moe: Any, words: str, tmp_path: Path) -> None:
    model = made(attention, moe)
    with pytest.raises(ConfigError, match=words):
        export_gguf(model.config, weights_of(model), tmp_path / "m.gguf", byte())
    assert list(tmp_path.iterdir()) == []


def test_refusals_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = made("mla", V3), tmp_path / "m.gguf"
    weights = weights_of(model)
    with pytest.raises(ConfigError, match="f32, f16, bf16, q8_0"):
        export_gguf(model.config, weights, file, byte(), kind="q2_k")
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        export_gguf(model.config, weights, file, None)
    with pytest.raises(ConfigError, match="splitting rule"):
        export_gguf(model.config, weights, file, character(["abc"]))
    with pytest.raises(ConfigError, match="0 MTP depths"):
        export_gguf(model.config, weights, file, byte(), mtp=True)
    deep = made("mla", V3, depths=1)
    with pytest.raises(ConfigError, match="low rank"):
        export_gguf(deep.config, weights_of(deep), file, byte(), mtp=True)
    with torch.no_grad():
        model.norm.weight[0] = 1e6  # norms stay float32
        model.embed_tokens.weight[0, 0] = 1e6
    with pytest.raises(ConfigError, match=r"token_embd\.weight has numbers beyond 65504"):
        export_gguf(model.config, weights, file, byte(), kind="f16")
    assert list(tmp_path.iterdir()) == []
    export_gguf(model.config, weights, file, byte(), kind="bf16")
    with pytest.raises(CheckpointError, match="there already"):
        export_gguf(model.config, weights, file, byte())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(DependencyError, match="pip install"):
        export_gguf(model.config, weights, tmp_path / "other.gguf", byte())


def test_tied_head_is_not_stored_twice(tmp_path: Path) -> None:
    model = made("mla", V3, tie_word_embeddings=True)
    file = export_gguf(model.config, weights_of(model), tmp_path / "m.gguf", byte(), kind="f32")
    assert "output.weight" not in {t.name for t in gguf.GGUFReader(file).tensors}
    assert wrong_by(model, Llama(file), prompts()) < 2e-4
