"""What is known to go wrong with a config.json in some engine, silently or with an error, and the way out.

Found by running the engines side by side, or by reading their code: transformers 5.23, vLLM 0.33 (and its CPU build
0.32), SGLang 0.5.23, llama.cpp of October 2026, mlx-lm 0.32, Ollama of August 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Keys = Mapping[str, Any]
DEEPSEEK = ("deepseek_v2", "deepseek_v3")
PORTABLE = 512 + 64  # latent and rotary width that every backend has a kernel for
MTP_LAYER = 61  # the one layer number that transformers and mlx-lm know MTP under


@dataclass(frozen=True)
class Finding:
    """engine: who gets it wrong; what: how; remedy: what to change; silent: whether wrong numbers come without an
    error."""

    engine: str
    what: str
    remedy: str
    silent: bool

    def __str__(self) -> str:
        return f"{self.engine}: {self.what}; {self.remedy}"


@dataclass(frozen=True)
class Rule:
    """A finding and when it holds."""

    applies: Callable[[Keys], bool]
    finding: Finding


def silent(engine: str, applies: Callable[[Keys], bool], what: str, remedy: str) -> Rule:
    """An engine that gives wrong numbers."""
    return Rule(applies, Finding(engine, what, remedy, silent=True))


def loud(engine: str, applies: Callable[[Keys], bool], what: str, remedy: str) -> Rule:
    """An engine that stops with an error, or does without a feature."""
    return Rule(applies, Finding(engine, what, remedy, silent=False))


def lint(keys: Keys, names: Collection[str] | None = None, pre: str | None = None) -> list[Finding]:
    """Every finding that holds for a config.json.

    names: the tensors of the checkpoint, if known. pre: the name of the tokenizer's splitting rule in llama.cpp
    (`gguf.pre_tokenizer`), if known.
    """
    found = [rule.finding for rule in RULES if rule.applies(keys)]
    if keys.get("tie_word_embeddings") and _mla(keys) and names is not None and "lm_head.weight" not in names:
        found.append(HEAD)
    if pre is not None and pre != "deepseek-v3" and keys.get("model_type") == "deepseek_v3":
        found.append(OLLAMA)
    return found


def _mla(k: Keys) -> bool:
    return k.get("model_type") in DEEPSEEK


def _v3(k: Keys) -> bool:
    return k.get("model_type") == "deepseek_v3"


def _moe(k: Keys) -> bool:
    """Whether any layer is MoE."""
    return (
        _mla(k)
        and bool(k.get("n_routed_experts"))
        and k.get("first_k_dense_replace", 0) < k.get("num_hidden_layers", 0)
    )


def _rope_type(k: Keys) -> str:
    rope = k.get("rope_parameters") or k.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _mtp(k: Keys) -> int:
    return int(k.get("num_nextn_predict_layers") or 0)


def _groups(k: Keys) -> int:
    return int(k.get("n_group") or 1)


HEAD = Finding(
    "mlx-lm", "a tied head is not built from the embedding", "write lm_head.weight, a copy, beside it", silent=False
)
OLLAMA = Finding(
    "Ollama",
    "its own import of safetensors takes DeepSeek's splitting rule for every tokenizer of this family, which is not "
    "this one's",
    "give it the GGUF file",
    silent=True,
)

RULES = [
    # positions
    silent("vLLM on CPUs", lambda k: _mla(k) and _rope_type(k) == "default",
           "rope_type default turns the wrong rows of MLA (0.32)",
           "write rope_type yarn with factor 1.0, the same function"),
    silent("vLLM, llama.cpp, mlx-lm", lambda k: _v3(k) and k.get("rope_interleave") is False,
           "rope_interleave false is ignored", "permute the rotary rows to neighbouring pairs"),
    silent("mlx-lm", lambda k: k.get("rope_theta") is None, "rope_theta is read at the top level only",
           "write it there too"),
    # norms
    silent("vLLM, SGLang, llama.cpp", lambda k: _mla(k) and k.get("rms_norm_eps") != 1e-6,
           "the latent norms take rms_norm_eps, and 1e-6 in transformers, mlx-lm and here",
           "train with rms_norm_eps: 1e-6"),
    # routing
    silent("vLLM, llama.cpp", lambda k: _v3(k) and _moe(k) and not (k.get("scoring_func") and k.get("topk_method")),
           "without scoring_func and topk_method the gate is softmax without a bias", "write both"),
    loud("SGLang", lambda k: _moe(k) and None in (k.get("scoring_func"), k.get("topk_method"), k.get("moe_layer_freq")),
         "scoring_func, topk_method and moe_layer_freq are read without a default", "write all three"),
    silent("transformers, llama.cpp", lambda k: _moe(k) and (k.get("moe_layer_freq") or 1) != 1,
           "moe_layer_freq is ignored", "keep it 1"),
    silent("transformers", lambda k: k.get("model_type") == "deepseek_v2" and bool(k.get("norm_topk_prob")),
           "norm_topk_prob is ignored in V2", "train with norm_topk_prob: false"),
    silent("llama.cpp", lambda k: k.get("model_type") == "deepseek_v2" and _groups(k) > 1,
           "groups are scored by their best two experts, in V2 too", "train without groups"),
    loud("llama.cpp", lambda k: _moe(k) and _groups(k) > 1 and k.get("topk_group") == k.get("n_group"),
         "it stops where a token may use every group", "write n_group 1 and topk_group 1, the same function"),
    loud("llama.cpp", lambda k: _moe(k) and _groups(k) >= k.get("n_routed_experts", 0),
         "it stops at groups of one expert", "train with fewer groups"),
    loud("transformers", lambda k: _v3(k) and _moe(k) and k.get("n_group") is None,
         "it divides by n_group", "write n_group 1 and topk_group 1"),
    silent("mlx-lm",
           lambda k: _v3(k) and _moe(k) and (k.get("num_experts_per_tok"), k.get("norm_topk_prob")) == (1, True),
           "the weight of a single expert is not normalised",
           "train with two experts a token, or norm_topk_prob: false"),
    loud("mlx-lm", lambda k: _v3(k) and _moe(k) and k.get("topk_method") != "noaux_tc",
         "it knows the topk_method noaux_tc only", "write noaux_tc where there are no groups"),
    loud("llama.cpp", lambda k: _moe(k) and not k.get("n_shared_experts"),
         "it stops at shared experts of no width", "write one that gives zeros"),
    # shapes
    loud("llama.cpp", lambda k: bool(k.get("attention_bias")), "it has no biases in attention",
         "train with attention_bias false"),
    loud("llama.cpp's converter", lambda k: _mla(k) and k.get("q_lora_rank") is None,
         "it writes no q_lora_rank where queries have none, and the file does not load", "export to GGUF with Fathom"),
    loud("vLLM on CPUs, FlashMLA",
         lambda k: _mla(k) and (k.get("kv_lora_rank"), k.get("qk_rope_head_dim")) != (512, 64),
         f"kv_lora_rank + qk_rope_head_dim must be 512 + 64 = {PORTABLE}",
         "train with these widths where this matters"),
    loud("vLLM on CPUs",
         lambda k: _moe(k) and bool(k.get("hidden_size", 0) % 32 or k.get("moe_intermediate_size", 0) % 32),
         "its experts' kernel wants hidden_size and moe_intermediate_size in multiples of 32 (0.32)",
         "train with such widths where this matters"),
    loud("transformers", lambda k: k.get("model_type") == "deepseek_v2" and k.get("kv_lora_rank", 0) % 2 == 1,
         "it pairs up rotary numbers in place, which an odd kv_lora_rank forbids", "train with an even one"),
    # multi-token prediction
    silent("transformers", lambda k: _v3(k) and k.get("num_nextn_predict_layers") is None,
           "it takes num_nextn_predict_layers to be 1", "write 0"),
    loud("transformers", lambda k: _mtp(k) > 0 and k.get("num_hidden_layers") != MTP_LAYER,
         f"generate(use_mtp=True) finds MTP at layer {MTP_LAYER} only",
         "set DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [r'model\\.layers\\.N.*'] with N layers"),
    loud("mlx-lm", lambda k: _mtp(k) > 0 and k.get("num_hidden_layers") != MTP_LAYER,
         f"it drops MTP at layer {MTP_LAYER} only, and refuses it elsewhere", "export without MTP"),
    loud("SGLang, llama.cpp", lambda k: _mtp(k) > 1, "they run one MTP depth", "train one"),
    loud("llama.cpp", lambda k: _mtp(k) > 0 and k.get("q_lora_rank") is None,
         "its MTP needs queries of low rank", "export without MTP"),
    loud("llama.cpp", lambda k: _mtp(k) > 0 and not _moe(k), "its MTP layer must be MoE", "export without MTP"),
    # grouped-query attention
    silent("vLLM", lambda k: k.get("model_type") == "qwen2_moe" and k.get("qkv_bias") is False,
           "qkv_bias false gives garbage", "write zero biases and qkv_bias true"),
    loud("vLLM", lambda k: k.get("model_type") == "qwen2_moe" and not k.get("shared_expert_intermediate_size"),
         "it refuses a shared expert of no width", "write one that gives zeros"),
    loud("llama.cpp", lambda k: k.get("model_type") == "qwen2_moe" and bool(k.get("mlp_only_layers")),
         "it has no dense layers in this family", "export as mixtral"),
    loud("mlx-lm", lambda k: k.get("model_type") == "qwen2_moe" and 0 in (k.get("mlp_only_layers") or []),
         "it wants layer 0 to be MoE in this family", "export as mixtral"),
    loud("llama.cpp", lambda k: k.get("model_type") == "ernie4_5_moe" and (k.get("moe_layer_interval") or 1) != 1,
         "it knows moe_layer_interval 1 only", "copy dense networks into all experts"),
]  # fmt: skip
