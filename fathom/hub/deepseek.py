"""DeepseekV2ForCausalLM and DeepseekV3ForCausalLM.

    V2   softmax gate, weights as they are, no selection bias; greedy, or groups scored by their best expert; no MTP
    V3   sigmoid gate, selection bias; groups scored by the sum of their best two; MTP at model.layers.{N}, ...

The tensors are ours under the same names. Added on the way out: a shared expert that gives nothing where the model has
none (engines want one), the head where it is tied (mlx-lm wants it), and the copies of embedding and head that each
MTP depth carries in released checkpoints. A dense model becomes a V3 all of whose layers are leading dense ones.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from fathom.errors import ConfigError
from fathom.hub.family import (
    BIAS,
    FFN,
    PLAIN,
    Family,
    Keys,
    Stream,
    Weights,
    built,
    disk_names,
    has_uneven_bias,
    insist,
    layer_of,
    lead,
    mixture,
    needed,
    shared_keys,
    zeros,
)
from fathom.hub.rotary import mla_rope, read_rope, to_pairs, yarn_obstacles
from fathom.log import log
from fathom.model.attention.mla import MLAConfig
from fathom.model.moe.layer import MoEConfig
from fathom.model.transformer import ModelConfig

MLA_KEYS = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


class DeepSeek(Family):
    """What V2 and V3 share: MLA, leading dense layers, shared experts."""

    scoring_func: ClassVar[str]
    has_bias: ClassVar[bool]

    def obstacles(self, config: ModelConfig, weights: Weights) -> list[str]:
        if not isinstance(config.attention, MLAConfig):
            return ["its attention is GQA and not MLA; export it as qwen2_moe, mixtral, ernie4_5_moe or llama"]
        found = yarn_obstacles(config.attention.rope_scaling, whole_head=False)
        if lead(config) is None:
            found.append("its dense layers are not all leading ones (set moe.first_k_dense_replace, not moe.layers)")
        moe = mixture(config)
        if moe is not None:
            if moe.scoring_func != self.scoring_func:
                found.append(f"its gate is {moe.scoring_func}, and this family's is {self.scoring_func}")
            found += self.gate_obstacles(moe, weights)
        return found

    @abstractmethod
    def gate_obstacles(self, moe: MoEConfig, weights: Weights) -> list[str]:
        """What this family's router cannot do."""

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        a = config.attention
        assert isinstance(a, MLAConfig)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **shared_keys(config),
            **{key: getattr(a, key) for key in MLA_KEYS},
            "num_key_value_heads": a.num_attention_heads,
            "q_lora_rank": a.q_lora_rank,
            "head_dim": a.qk_rope_head_dim,
            "attention_bias": False,
            "attention_dropout": 0.0,
            **mla_rope(a.rope_theta, a.rope_scaling, config.max_position_embeddings),
            **self._describe_moe(config),
            "num_nextn_predict_layers": config.mtp.num_nextn_predict_layers,
        }

    def _describe_moe(self, config: ModelConfig) -> dict[str, Any]:
        moe, dense = mixture(config), lead(config)
        if moe is None:  # experts that no layer has; readers want numbers that make sense
            dense = config.num_hidden_layers + config.mtp.num_nextn_predict_layers
            moe = MoEConfig(n_routed_experts=8, moe_intermediate_size=config.intermediate_size)
        grouped = moe.topk_group < moe.n_group  # a token that may use every group knows none
        return {
            "moe_intermediate_size": moe.moe_intermediate_size,
            "n_routed_experts": moe.n_routed_experts,
            "n_shared_experts": max(1, moe.n_shared_experts),
            "num_experts_per_tok": moe.num_experts_per_tok,
            "first_k_dense_replace": dense,
            "moe_layer_freq": 1,
            "n_group": moe.n_group if grouped else 1,
            "topk_group": moe.topk_group if grouped else 1,
            "topk_method": self.method(grouped),
            "scoring_func": self.scoring_func,
            "norm_topk_prob": moe.norm_topk_prob,
            "routed_scaling_factor": moe.routed_scaling_factor,
        }

    @abstractmethod
    def method(self, grouped: bool) -> str:
        """The word for topk_method."""

    def understand(self, keys: Keys, weights: Weights) -> ModelConfig:
        insist(keys, {**PLAIN, "moe_layer_freq": (1,), "scoring_func": (self.scoring_func,)})
        insist(keys, {"num_key_value_heads": (keys.get("num_attention_heads"),)})
        layers = int(needed(keys, *SIZES, *MLA_KEYS)["num_hidden_layers"])
        attention = {"kind": "mla", **needed(keys, *MLA_KEYS), "q_lora_rank": keys.get("q_lora_rank")}
        attention |= read_rope(keys, 10000.0, whole_head=False)
        dense = keys.get("first_k_dense_replace") or 0
        return built(
            self.model_type,
            {
                **needed(keys, *SIZES),
                "max_position_embeddings": _longest(keys, attention["rope_scaling"]),
                "rms_norm_eps": keys.get("rms_norm_eps", 1e-6),
                "tie_word_embeddings": bool(keys.get("tie_word_embeddings")),
                "initializer_range": keys.get("initializer_range", 0.02),
                "attention": attention,
                "moe": self._understand_moe(keys, weights, dense) if dense < layers else None,
                "mtp": {"num_nextn_predict_layers": self._depths(keys, weights, layers)},
            },
        )

    def _understand_moe(self, keys: Keys, weights: Weights, dense: int) -> dict[str, Any]:
        names = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
        moe = {**needed(keys, *names), **self.understand_gate(keys)}
        shared = keys.get("n_shared_experts") or 0
        outputs = [name for name in weights if name.endswith("mlp.shared_experts.down_proj.weight")]
        if shared and outputs and all(zeros(weights, name) for name in outputs):
            shared = 0  # the one that an export of ours adds
        return moe | {
            "n_shared_experts": shared,
            "first_k_dense_replace": dense,
            "scoring_func": self.scoring_func,
            "routed_scaling_factor": float(keys.get("routed_scaling_factor") or 1.0),
        }

    @abstractmethod
    def understand_gate(self, keys: Keys) -> dict[str, Any]:
        """What config.json says about choosing experts. ConfigError: a router that is not ours."""

    def _depths(self, keys: Keys, weights: Weights, layers: int) -> int:
        said = keys.get("num_nextn_predict_layers") or keys.get("num_mtp_layers") or 0
        if said and not any(name.startswith(f"model.layers.{layers}.") for name in weights):
            log.warning("config.json speaks of %d MTP layers, and none is in the files; the model has no MTP", said)
            return 0
        return int(said)

    def outward(self, config: ModelConfig, keys: Keys, weights: Weights) -> Stream:
        moe = mixture(config)
        for name in disk_names(config):
            if name.endswith(BIAS) and not self.has_bias:
                continue
            yield name, weights[name]
            if name.endswith("mlp.gate.weight") and moe is not None and not moe.n_shared_experts:
                inner = (keys.get("n_shared_experts") or 0) * moe.moe_intermediate_size
                for part in FFN if inner else ():
                    shape = (config.hidden_size, inner) if part == "down_proj" else (inner, config.hidden_size)
                    yield (
                        f"{name.removesuffix('gate.weight')}shared_experts.{part}.weight",
                        weights[name].new_zeros(shape),
                    )
        for copy, original in self.copies(config).items():
            yield copy, weights[original]

    def inward(self, config: ModelConfig, keys: Keys, weights: Weights) -> Stream:
        halves = keys.get("rope_interleave") is False
        for name in disk_names(config):
            if name.endswith(BIAS):
                experts = config.moe.n_routed_experts if config.moe else 0
                yield name, weights[name].float() if self.has_bias else torch.zeros(experts)
            else:
                yield name, _in_pairs(config, name, weights[name]) if halves else weights[name]

    def copies(self, config: ModelConfig) -> dict[str, str]:
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        found = super().copies(config)
        for depth in range(config.mtp.num_nextn_predict_layers):
            prefix = f"model.layers.{config.num_hidden_layers + depth}"
            found[f"{prefix}.embed_tokens.weight"] = "model.embed_tokens.weight"
            found[f"{prefix}.shared_head.head.weight"] = head
        return found


class DeepSeekV2(DeepSeek):
    """DeepseekV2ForCausalLM."""

    model_type, architecture, scoring_func, has_bias = "deepseek_v2", "DeepseekV2ForCausalLM", "softmax", False
    heads_divide = True  # transformers insists that the heads divide hidden_size, which means nothing to MLA

    def obstacles(self, config: ModelConfig, weights: Weights) -> list[str]:
        found = super().obstacles(config, weights)
        if config.mtp.num_nextn_predict_layers:
            found.append("it has MTP; export without it (mtp off)")
        if self.heads_divide and config.hidden_size % config.attention.num_attention_heads:
            found.append(
                f"hidden_size {config.hidden_size} is no multiple of its {config.attention.num_attention_heads} heads, "
                "which transformers insists on here"
            )
        return found

    def gate_obstacles(self, moe: MoEConfig, weights: Weights) -> list[str]:
        found = []
        if moe.norm_topk_prob and moe.num_experts_per_tok < moe.n_routed_experts:
            found.append("moe.norm_topk_prob is true, which this family does not know")
        if moe.topk_group < moe.n_group and moe.topk_method == "noaux_tc":
            found.append("its groups score the sum of their best two experts, and here they score their best one")
        if has_uneven_bias(weights):
            found.append("it has selection biases that differ between experts, and this family has none")
        return found

    def method(self, grouped: bool) -> str:
        return "group_limited_greedy" if grouped else "greedy"

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        return {**super().describe(config), "norm_topk_prob": False, "mlp_bias": False}

    def understand_gate(self, keys: Keys) -> dict[str, Any]:
        insist(keys, {"topk_method": ("greedy", "group_limited_greedy")})
        k, experts = keys["num_experts_per_tok"], keys["n_routed_experts"]
        if keys.get("norm_topk_prob") and k != experts:
            raise ConfigError(
                "this deepseek_v2 config.json has norm_topk_prob true, which transformers ignores and DeepSeek's own "
                "code does not; write false if the model was made with transformers"
            )
        method = keys.get("topk_method") or "greedy"
        groups = {} if method == "greedy" else _groups(keys)
        return {"topk_method": method, "norm_topk_prob": False, "balance": {"kind": "sequence_loss"}, **groups}


class DeepSeekV3(DeepSeek):
    """DeepseekV3ForCausalLM."""

    model_type, architecture, scoring_func, has_bias = "deepseek_v3", "DeepseekV3ForCausalLM", "sigmoid", True

    def gate_obstacles(self, moe: MoEConfig, weights: Weights) -> list[str]:
        found = []
        if moe.topk_group < moe.n_group and moe.topk_method == "group_limited_greedy":
            found.append("its groups score their best expert, and here they score the sum of their best two")
        if moe.n_routed_experts < 2:
            found.append("it has one expert, and the router of this family always looks for the best two")
        return found

    def method(self, grouped: bool) -> str:
        return "noaux_tc"

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        return {**super().describe(config), "rope_interleave": True}

    def understand_gate(self, keys: Keys) -> dict[str, Any]:
        insist(keys, {"topk_method": ("noaux_tc",)})
        norm = keys.get("norm_topk_prob")
        return {"topk_method": "noaux_tc", "norm_topk_prob": True if norm is None else norm, **_groups(keys)}


def _groups(keys: Keys) -> dict[str, Any]:
    return {"n_group": keys.get("n_group") or 1, "topk_group": keys.get("topk_group") or 1}


def _longest(keys: Keys, scaling: dict[str, Any] | None) -> int:
    """max_position_embeddings, at most what YaRN stretches to."""
    said = int(keys.get("max_position_embeddings") or 4096)
    if scaling is None:
        return said
    reached = int(scaling["factor"] * scaling["original_max_position_embeddings"])
    if said > reached:
        log.warning("max_position_embeddings is %d, and YaRN reaches to %d; that is taken", said, reached)
    return min(said, reached)


def _in_pairs(config: ModelConfig, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rotary rows in neighbouring pairs, of a model that was trained with halves (rope_interleave false)."""
    a, at = config.attention, layer_of(name)
    if at is None or not isinstance(a, MLAConfig):
        return tensor
    if at[1] in ("self_attn.q_proj.weight", "self_attn.q_b_proj.weight"):
        plain, turned = tensor.unflatten(0, (a.num_attention_heads, -1)).split(
            (a.qk_nope_head_dim, a.qk_rope_head_dim), dim=1
        )
        turned = to_pairs(turned.flatten(0, 1), a.num_attention_heads).view_as(turned)
        return torch.cat((plain, turned), dim=1).flatten(0, 1)
    if at[1] == "self_attn.kv_a_proj_with_mqa.weight":
        latent, turned = tensor.split((a.kv_lora_rank, a.qk_rope_head_dim), dim=0)
        return torch.cat((latent, to_pairs(turned, 1)), dim=0)
    return tensor
