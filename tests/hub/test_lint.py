from __future__ import annotations

from typing import Any

import pytest
from random_models import random_model

from fathom.hub.huggingface import FAMILIES
from fathom.hub.lint import RULES, Finding, lint

CLEAN: dict[str, Any] = {
    "model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 16,
    "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "moe_layer_freq": 1, "rms_norm_eps": 1e-6, "q_lora_rank": 96,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "rope_theta": 10000.0, "attention_bias": False,
    "rope_parameters": {"rope_type": "yarn", "factor": 1.0}, "rope_interleave": True, "num_nextn_predict_layers": 0,
}  # fmt: skip
QWEN = {"model_type": "qwen2_moe", "qkv_bias": True, "shared_expert_intermediate_size": 8, "rope_theta": 1.0}
ERNIE = {"model_type": "ernie4_5_moe", "moe_layer_interval": 1, "rope_theta": 1.0}

WRONG: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (CLEAN, {"rope_parameters": {"rope_type": "default"}}, "vLLM on CPUs", "yarn with factor 1.0"),
    (CLEAN, {"rope_interleave": False}, "llama.cpp", "pairs"),
    (CLEAN, {"rope_theta": None}, "mlx-lm", "there too"),
    (CLEAN, {"rms_norm_eps": 1e-5}, "SGLang", "1e-6"),
    (CLEAN, {"scoring_func": None}, "vLLM, llama.cpp", "both"),
    (CLEAN, {"moe_layer_freq": None}, "SGLang", "all three"),
    (CLEAN, {"moe_layer_freq": 2}, "transformers", "keep it 1"),
    (CLEAN, {"model_type": "deepseek_v2", "norm_topk_prob": True}, "transformers", "false"),
    (CLEAN, {"model_type": "deepseek_v2", "n_group": 4, "topk_group": 2}, "llama.cpp", "without groups"),
    (CLEAN, {"n_group": 4, "topk_group": 4}, "llama.cpp", "n_group 1"),
    (CLEAN, {"n_group": 16, "topk_group": 8}, "llama.cpp", "fewer groups"),
    (CLEAN, {"n_group": None}, "transformers", "n_group 1"),
    (CLEAN, {"num_experts_per_tok": 1}, "mlx-lm", "two experts"),
    (CLEAN, {"topk_method": "greedy"}, "mlx-lm", "noaux_tc"),
    (CLEAN, {"n_shared_experts": 0}, "llama.cpp", "zeros"),
    (CLEAN, {"attention_bias": True}, "llama.cpp", "attention_bias false"),
    (CLEAN, {"q_lora_rank": None}, "llama.cpp's converter", "GGUF"),
    (CLEAN, {"kv_lora_rank": 128}, "FlashMLA", "widths"),
    (CLEAN, {"moe_intermediate_size": 24}, "vLLM on CPUs", "such widths"),
    (CLEAN, {"model_type": "deepseek_v2", "kv_lora_rank": 5, "norm_topk_prob": False}, "transformers", "even"),
    (CLEAN, {"num_nextn_predict_layers": None}, "transformers", "write 0"),
    (CLEAN, {"num_nextn_predict_layers": 1}, "transformers", "_keys_to_ignore"),
    (CLEAN, {"num_nextn_predict_layers": 1}, "mlx-lm", "without MTP"),
    (CLEAN, {"num_nextn_predict_layers": 2}, "SGLang", "one"),
    (CLEAN, {"num_nextn_predict_layers": 1, "q_lora_rank": None}, "llama.cpp", "without MTP"),
    (CLEAN, {"num_nextn_predict_layers": 1, "first_k_dense_replace": 4}, "llama.cpp", "without MTP"),
    (QWEN, {"qkv_bias": False}, "vLLM", "zero biases"),
    (QWEN, {"shared_expert_intermediate_size": 0}, "vLLM", "zeros"),
    (QWEN, {"mlp_only_layers": [1]}, "llama.cpp", "mixtral"),
    (QWEN, {"mlp_only_layers": [0]}, "mlx-lm", "mixtral"),
    (ERNIE, {"moe_layer_interval": 2}, "llama.cpp", "copy"),
]  # fmt: skip


@pytest.mark.parametrize("clean", [CLEAN, QWEN, ERNIE], ids=lambda keys: keys["model_type"])
def test_a_clean_config_has_no_finding(clean: dict[str, Any]) -> None:
    assert lint(clean) == []


@pytest.mark.parametrize(("clean", "change", "engine", "remedy"), WRONG)
def test_each_rule_finds_its_case(clean: dict[str, Any], change: dict[str, Any], engine: str, remedy: str) -> None:
    found = lint({**clean, **change})
    assert any(engine in f.engine and remedy in f.remedy for f in found), [str(f) for f in found]


def test_every_rule_has_a_case() -> None:
    seen: set[Finding] = set()
    for clean, change, _, _ in WRONG:
        seen |= set(lint({**clean, **change}))
    assert {rule.finding for rule in RULES} <= seen


def test_what_only_tensors_and_tokenizers_tell() -> None:
    tied = {**CLEAN, "tie_word_embeddings": True}
    assert lint(tied, {"model.embed_tokens.weight"})[0].engine == "mlx-lm"
    assert lint(tied, {"model.embed_tokens.weight", "lm_head.weight"}) == []
    assert lint(CLEAN, pre="gpt-2")[0].engine == "Ollama"
    assert lint(CLEAN, pre="deepseek-v3") == []


@pytest.mark.parametrize("seed", range(6))
def test_our_own_configs_leave_no_silent_routing_mistake(seed: int) -> None:
    keys = FAMILIES["deepseek_v3"].describe(random_model("deepseek_v3", seed).config)
    what = " ".join(f.what for f in lint(keys) if f.silent)
    assert not any(word in what for word in ("scoring_func", "rope_type", "moe_layer_freq", "num_nextn"))
