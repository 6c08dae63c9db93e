"""Where a model with grouped-query attention goes: Llama, Qwen2Moe, Mixtral, Ernie4_5_Moe.

    llama         dense
    qwen2_moe     MoE at any layers; no selection bias. Biases of q, k, v and the gate of the shared expert are written
                  as zeros; sigmoid(0) = 1/2 is made good in its output
    mixtral       MoE everywhere: a dense layer becomes copies of its network, since weights that add up to 1 make one
                  network of equal ones; no selection bias, no shared expert
    ernie4_5_moe  as mixtral from its first MoE layer on, with a selection bias and shared experts

All gates are softmax without groups; mixtral and ernie4_5_moe renormalise the chosen weights. Networks of unequal width
are widened with zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    moe_layers,
    needed,
    shared_keys,
    widened,
    zeros,
)
from fathom.hub.rotary import gqa_rope, read_rope, to_halves, to_pairs, yarn_obstacles
from fathom.model.attention.gqa import GQAConfig
from fathom.model.moe.layer import MoEConfig
from fathom.model.transformer import ModelConfig

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WINDOWS = {"use_sliding_window": (False,)}


class Grouped(Family):
    """What these families share: GQA, no MTP, softmax gate without groups."""

    in_halves = True  # the order of rotary rows
    has_bias = has_shared = always_norms = False
    theta = 10000.0

    # --- out

    def obstacles(self, config: ModelConfig, weights: Weights) -> list[str]:
        if not isinstance(config.attention, GQAConfig):
            return ["its attention is MLA and not GQA; export it as deepseek_v3 or deepseek_v2"]
        found = yarn_obstacles(config.attention.rope_scaling, whole_head=True)
        if config.mtp.num_nextn_predict_layers:
            found.append("it has MTP; export without it (mtp off)")
        moe = mixture(config)
        return found + (self.moe_obstacles(moe, weights) if moe is not None else self.dense_obstacles())

    def dense_obstacles(self) -> list[str]:
        return ["it has no MoE layer; export it as llama"]

    def moe_obstacles(self, moe: MoEConfig, weights: Weights) -> list[str]:
        found = []
        if moe.scoring_func != "softmax":
            found.append(f"its gate is {moe.scoring_func}, and this family's is softmax")
        if moe.topk_group < moe.n_group:
            found.append("its experts are in groups, and this family has none")
        if moe.routed_scaling_factor != 1:
            found.append(f"moe.routed_scaling_factor is {moe.routed_scaling_factor}, and here it is always 1")
        if self.always_norms and not moe.norm_topk_prob and moe.num_experts_per_tok < moe.n_routed_experts:
            found.append("moe.norm_topk_prob is false, and this family always divides by the sum")
        if not self.has_shared and moe.n_shared_experts:
            found.append("it has shared experts, and this family has none; export it as qwen2_moe or ernie4_5_moe")
        if not self.has_bias and has_uneven_bias(weights):
            found.append(
                "it has selection biases that differ between experts, and this family has none; "
                "export it as ernie4_5_moe"
            )
        return found

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        a = config.attention
        assert isinstance(a, GQAConfig)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **shared_keys(config),
            "num_attention_heads": a.num_attention_heads,
            "num_key_value_heads": a.num_key_value_heads,
            "head_dim": a.size(config.hidden_size),
            "attention_dropout": 0.0,
            **gqa_rope(a.rope_theta, a.rope_scaling),
            **self.describe_moe(config),
        }

    def describe_moe(self, config: ModelConfig) -> dict[str, Any]:
        return {}

    def outward(self, config: ModelConfig, keys: Keys, weights: Weights) -> Stream:
        for name in disk_names(config):
            at = layer_of(name)
            if at is None:
                yield name, weights[name]
            else:
                yield from self.layer_outward(config, keys, f"model.layers.{at[0]}.", at, weights[name])

    def layer_outward(
        self, config: ModelConfig, keys: Keys, prefix: str, at: tuple[int, str], tensor: Tensor
    ) -> Stream:
        """One tensor of ours, at (layer, name in it) -> those of the family that it becomes."""
        heads = self._heads(config, at[1])
        yield prefix + self.theirs(at[1]), to_halves(tensor, heads) if heads and self.in_halves else tensor

    def theirs(self, name: str) -> str:
        """The family's name for ours, inside a layer."""
        return name

    @staticmethod
    def _heads(config: ModelConfig, name: str) -> int:
        """The heads of a projection whose rows are turned; 0 for others."""
        a = config.attention
        assert isinstance(a, GQAConfig)
        return {"self_attn.q_proj.weight": a.num_attention_heads, "self_attn.k_proj.weight": a.num_key_value_heads}.get(
            name, 0
        )

    # --- in

    def understand(self, keys: Keys, weights: Weights) -> ModelConfig:
        insist(keys, {**PLAIN, **WINDOWS})
        needed(keys, *SIZES)
        heads = keys["num_attention_heads"]
        attention = {
            "kind": "gqa",
            "num_attention_heads": heads,
            "num_key_value_heads": keys.get("num_key_value_heads") or heads,
            "head_dim": keys.get("head_dim"),
            **read_rope(keys, self.theta, whole_head=True),
        }
        return built(
            self.model_type,
            {
                **needed(keys, *SIZES[:-1]),
                "max_position_embeddings": keys.get("max_position_embeddings") or 4096,
                "rms_norm_eps": keys.get("rms_norm_eps", 1e-6),
                "tie_word_embeddings": bool(keys.get("tie_word_embeddings", self.model_type == "ernie4_5_moe")),
                "initializer_range": keys.get("initializer_range", 0.02),
                "attention": attention,
                "moe": self.understand_moe(keys, weights),
            },
        )

    def understand_moe(self, keys: Keys, weights: Weights) -> dict[str, Any] | None:
        return None

    def inward(self, config: ModelConfig, keys: Keys, weights: Weights) -> Stream:
        for name in disk_names(config):
            at = layer_of(name)
            if at is None:
                yield name, weights[name]
                continue
            if at[1].endswith(BIAS) and not self.has_bias:
                yield name, torch.zeros(config.moe.n_routed_experts if config.moe else 0)
                continue
            tensor, heads = weights[f"model.layers.{at[0]}.{self.theirs(at[1])}"], self._heads(config, at[1])
            yield name, self.part_inward(at[1], to_pairs(tensor, heads) if heads and self.in_halves else tensor)

    def part_inward(self, name: str, tensor: Tensor) -> Tensor:
        """What is left to do to a tensor on the way in."""
        return tensor


class Llama(Grouped):
    """LlamaForCausalLM."""

    model_type, architecture = "llama", "LlamaForCausalLM"

    def dense_obstacles(self) -> list[str]:
        return []

    def moe_obstacles(self, moe: MoEConfig, weights: Weights) -> list[str]:
        return ["it has MoE layers, and this family has none; export it as qwen2_moe, mixtral or ernie4_5_moe"]

    def describe_moe(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": False, "mlp_bias": False}


class Qwen2Moe(Grouped):
    """Qwen2MoeForCausalLM."""

    model_type, architecture = "qwen2_moe", "Qwen2MoeForCausalLM"
    has_shared = True

    def describe_moe(self, config: ModelConfig) -> dict[str, Any]:
        moe, sparse = config.moe, moe_layers(config)
        assert moe is not None
        return {
            "num_experts": moe.n_routed_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "moe_intermediate_size": moe.moe_intermediate_size,
            "shared_expert_intermediate_size": moe.moe_intermediate_size * max(1, moe.n_shared_experts),
            "norm_topk_prob": moe.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(config.num_hidden_layers) if i not in sparse],
            "qkv_bias": True,
            "use_sliding_window": False,
        }

    def layer_outward(
        self, config: ModelConfig, keys: Keys, prefix: str, at: tuple[int, str], tensor: Tensor
    ) -> Stream:
        name = at[1]
        if name.endswith(BIAS):
            return
        if name == "mlp.shared_experts.down_proj.weight":
            tensor = tensor * 2
        yield from super().layer_outward(config, keys, prefix, at, tensor)
        if name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            yield prefix + name.replace("weight", "bias"), tensor.new_zeros(tensor.shape[0])
        if name == "mlp.gate.weight":
            width, inner = config.hidden_size, keys["shared_expert_intermediate_size"]
            yield f"{prefix}mlp.shared_expert_gate.weight", tensor.new_zeros(1, width)
            if config.moe is not None and not config.moe.n_shared_experts:
                for part in FFN:
                    shape = (width, inner) if part == "down_proj" else (inner, width)
                    yield f"{prefix}mlp.shared_expert.{part}.weight", tensor.new_zeros(shape)

    def theirs(self, name: str) -> str:
        return name.replace("shared_experts", "shared_expert")

    def understand_moe(self, keys: Keys, weights: Weights) -> dict[str, Any]:
        insist(keys, {"qkv_bias": (True,), "decoder_sparse_step": (1,)})
        dense = keys.get("mlp_only_layers") or []
        layers = [i for i in range(keys["num_hidden_layers"]) if i not in dense]
        outputs = [f"model.layers.{i}.mlp.shared_expert.down_proj.weight" for i in layers]
        gives = not all(zeros(weights, name) for name in outputs)
        gates = [f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in layers] if gives else []
        biases = [f"model.layers.{i}.self_attn.{n}_proj.bias" for i in range(keys["num_hidden_layers"]) for n in "qkv"]
        used = [name for name in (*gates, *biases) if name in weights and not zeros(weights, name)]
        if used:
            raise ConfigError(
                f"this qwen2_moe model has biases in its attention, or a gate on its shared expert ({used[0]}); "
                "only one where these are zero is the same as a model of ours"
            )
        names = ("num_experts_per_tok", "moe_intermediate_size")
        moe = {"layers": layers, "n_routed_experts": needed(keys, "num_experts")["num_experts"], **needed(keys, *names)}
        width = needed(keys, "shared_expert_intermediate_size")["shared_expert_intermediate_size"]
        shared, rest = divmod(width, moe["moe_intermediate_size"]) if gives else (0, 0)
        if rest:
            raise ConfigError(
                f"shared_expert_intermediate_size {width} is no multiple of moe_intermediate_size "
                f"{moe['moe_intermediate_size']}; our shared experts are as wide as the others"
            )
        norm = bool(keys.get("norm_topk_prob"))
        return moe | {"n_shared_experts": shared, "norm_topk_prob": norm, "scoring_func": "softmax"}

    def part_inward(self, name: str, tensor: Tensor) -> Tensor:
        return tensor / 2 if name == "mlp.shared_experts.down_proj.weight" else tensor


class Copying(Grouped):
    """Families whose MoE layers have no gap: a dense layer among them becomes copies of its network."""

    always_norms = True
    width_key: str

    def sparse(self, keys: Keys) -> list[int]:
        """The layers that are MoE by config.json."""
        return list(range(keys["num_hidden_layers"]))

    def width(self, config: ModelConfig, copies: bool) -> int:
        """The common width of all experts."""
        assert config.moe is not None
        own = config.moe.moe_intermediate_size
        return max(own, config.intermediate_size) if copies else own

    def layer_outward(
        self, config: ModelConfig, keys: Keys, prefix: str, at: tuple[int, str], tensor: Tensor
    ) -> Stream:
        (layer, name), moe, width = at, config.moe, keys[self.width_key]
        assert moe is not None
        part = name.split(".")[-2]
        if name.startswith("mlp.") and config.moe_of(layer) is None and layer in self.sparse(keys):
            wide = widened(tensor, part, width)
            for expert in range(moe.n_routed_experts):
                yield prefix + self.theirs(f"mlp.experts.{expert}.{part}.weight"), wide
            if part == "gate_proj":
                yield from self.filling(config, keys, prefix, tensor)
            return
        if "experts." in name:
            tensor = widened(tensor, part, (moe.n_shared_experts if "shared_experts" in name else 1) * width)
        yield from super().layer_outward(config, keys, prefix, at, tensor)

    def filling(self, config: ModelConfig, keys: Keys, prefix: str, like: Tensor) -> Stream:
        """What a copied layer needs beside its experts: a router that likes all of them alike."""
        assert config.moe is not None
        router = like.new_zeros(config.moe.n_routed_experts, config.hidden_size)
        yield prefix + self.theirs("mlp.gate.weight"), router


class Mixtral(Copying):
    """MixtralForCausalLM."""

    model_type, architecture, theta, width_key = "mixtral", "MixtralForCausalLM", 1e6, "intermediate_size"

    def describe_moe(self, config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        copies = len(moe_layers(config)) < config.num_hidden_layers
        return {
            "intermediate_size": self.width(config, copies),
            "num_local_experts": config.moe.n_routed_experts,
            "num_experts_per_tok": config.moe.num_experts_per_tok,
            "sliding_window": None,
        }

    def layer_outward(
        self, config: ModelConfig, keys: Keys, prefix: str, at: tuple[int, str], tensor: Tensor
    ) -> Stream:
        if not at[1].endswith(BIAS):
            yield from super().layer_outward(config, keys, prefix, at, tensor)

    def theirs(self, name: str) -> str:
        if not name.startswith("mlp."):
            return name
        for part, number in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            name = name.replace(part, number)
        return name.replace("mlp.", "block_sparse_moe.")

    def understand_moe(self, keys: Keys, weights: Weights) -> dict[str, Any]:
        if keys.get("sliding_window") is not None:
            raise ConfigError(
                f"this mixtral config.json has sliding_window {keys['sliding_window']}; our attention sees everything"
            )
        found = needed(keys, "num_local_experts", "intermediate_size")
        return {
            "n_routed_experts": found["num_local_experts"],
            "num_experts_per_tok": keys.get("num_experts_per_tok") or 2,
            "moe_intermediate_size": found["intermediate_size"],
            "scoring_func": "softmax",
            "norm_topk_prob": True,
        }


class Ernie(Copying):
    """Ernie4_5_MoeForCausalLM."""

    model_type, architecture, theta = "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", 500000.0
    width_key, in_halves = "moe_intermediate_size", False
    has_bias = has_shared = True

    def sparse(self, keys: Keys) -> list[int]:
        count, end = keys["num_hidden_layers"], keys.get("moe_layer_end_index", -1)
        start, step = keys.get("moe_layer_start_index", 1), keys.get("moe_layer_interval") or 1
        last = count - 1 if end in (-1, None) else end
        return [i for i in range(count) if (i + 1) % step == 0 and start <= i <= last]

    def describe_moe(self, config: ModelConfig) -> dict[str, Any]:
        moe, sparse = config.moe, moe_layers(config)
        assert moe is not None
        return {
            "moe_num_experts": moe.n_routed_experts,
            "moe_k": moe.num_experts_per_tok,
            "moe_intermediate_size": self.width(config, copies=lead(config) is None),
            "moe_num_shared_experts": moe.n_shared_experts,
            "moe_layer_start_index": min(sparse),
            "moe_layer_end_index": config.num_hidden_layers - 1,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
            "use_bias": False,
        }

    def layer_outward(
        self, config: ModelConfig, keys: Keys, prefix: str, at: tuple[int, str], tensor: Tensor
    ) -> Stream:
        if at[1].endswith(BIAS):
            tensor = tensor.unsqueeze(0)
        yield from super().layer_outward(config, keys, prefix, at, tensor)

    def filling(self, config: ModelConfig, keys: Keys, prefix: str, like: Tensor) -> Stream:
        yield from super().filling(config, keys, prefix, like)
        assert config.moe is not None
        bias = torch.zeros(1, config.moe.n_routed_experts, device=like.device)
        yield prefix + self.theirs(f"mlp.gate.{BIAS}"), bias
        inner = config.moe.n_shared_experts * keys[self.width_key]
        for part in FFN if inner else ():
            shape = (config.hidden_size, inner) if part == "down_proj" else (inner, config.hidden_size)
            yield f"{prefix}mlp.shared_experts.{part}.weight", like.new_zeros(shape)

    def theirs(self, name: str) -> str:
        return name.replace(f"mlp.gate.{BIAS}", f"mlp.moe_statics.{BIAS}")

    def understand_moe(self, keys: Keys, weights: Weights) -> dict[str, Any]:
        found = needed(keys, "moe_num_experts", "moe_intermediate_size", "moe_k")
        return {
            "layers": self.sparse(keys),
            "n_routed_experts": found["moe_num_experts"],
            "num_experts_per_tok": found["moe_k"],
            "moe_intermediate_size": found["moe_intermediate_size"],
            "n_shared_experts": keys.get("moe_num_shared_experts", 2),
            "scoring_func": "softmax",
            "norm_topk_prob": True,
        }

    def part_inward(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.squeeze(0).float() if name.endswith(BIAS) else tensor
