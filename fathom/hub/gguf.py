"""GGUF files for llama.cpp, Ollama and LM Studio.

    MLA   -> deepseek2      W_uk and W_uv apart, since llama.cpp attends in latent space
    GQA   -> llama          dense, or MoE everywhere (dense layers as copies of their network, see `grouped.py`)
          -> ernie4_5-moe   with a selection bias or shared experts

llama.cpp's own converter knows tokenizers by a hash and refuses self-trained ones, and writes no query rank where there
is none, which its loader wants; here the splitting rule is named (`pre.py`) and the rank written as 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.errors import ConfigError, DependencyError
from fathom.hub.deepseek import DeepSeekV2, DeepSeekV3
from fathom.hub.family import BIAS, Family, Keys, Stream, Weights, has_uneven_bias, mixture, moe_layers
from fathom.hub.grouped import Ernie, Llama, Mixtral
from fathom.hub.huggingface import blank_weights, check_memory, check_vocabulary, check_weights, whole_file, without_mtp
from fathom.hub.names import gguf_name
from fathom.hub.pre import pre_tokenizer
from fathom.log import log
from fathom.model.attention.mla import MLAConfig
from fathom.model.transformer import ModelConfig
from fathom.tokenizer.tokenizer import Tokenizer

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
NO_MERGE = "Ā Ā"  # llama.cpp wants a merge; one that makes no token is undone, byte by byte
HALF_MAX = 65504.0  # the largest number of float16


class PairedLlama(Llama):
    """Llama as llama.cpp has it: neighbouring rotary pairs."""

    in_halves = False


class PairedMixtral(Mixtral):
    """Mixtral as llama.cpp has it: neighbouring rotary pairs."""

    in_halves = False


class FreeDeepSeekV2(DeepSeekV2):
    """DeepSeek-V2 without what transformers alone insists on."""

    heads_divide = False


@dataclass(frozen=True)
class Plan:
    """How a model becomes a GGUF file: the architecture's name there, and the family whose tensors it is made of."""

    architecture: str
    family: Family
    config: ModelConfig
    keys: Keys


def plan(config: ModelConfig, weights: Weights, mtp: bool) -> Plan:
    """Choose the architecture. ConfigError: llama.cpp has none for this model."""
    check_memory(config)
    if not mtp:
        config = without_mtp(config)
    name, family = _choose(config, weights)
    found = family.obstacles(config, weights) + _obstacles(config, mtp)
    if found:
        raise ConfigError(f"llama.cpp's {name} cannot hold this model: {'; '.join(found)}")
    return Plan(name, family, config, family.describe(config))


def _choose(config: ModelConfig, weights: Weights) -> tuple[str, Family]:
    moe = mixture(config)
    if isinstance(config.attention, MLAConfig):
        sigmoid = moe is None or moe.scoring_func == "sigmoid"
        return "deepseek2", DeepSeekV3() if sigmoid else FreeDeepSeekV2()
    if moe is None:
        return "llama", PairedLlama()
    if moe.n_shared_experts or has_uneven_bias(weights):
        return "ernie4_5-moe", Ernie()
    return "llama", PairedMixtral()


def _obstacles(config: ModelConfig, mtp: bool) -> list[str]:
    """What llama.cpp has no word for, beyond what the family has none for."""
    found, moe, a = [], mixture(config), config.attention
    scaling = a.rope_scaling
    if isinstance(a, MLAConfig) and scaling and scaling.factor > 1 and scaling.mscale != scaling.mscale_all_dim:
        found.append("attention.rope_scaling has an mscale other than mscale_all_dim, which it reads for both")
    if moe is not None and moe.topk_group < moe.n_group:
        if moe.topk_method == "group_limited_greedy":
            found.append("its groups score their best expert, and there the sum of their best two")
        if moe.n_group == moe.n_routed_experts:
            found.append("its groups have one expert each")
    if mtp:
        depths = config.mtp.num_nextn_predict_layers
        if depths != 1:
            found.append(f"it has {depths} MTP depths, and there must be one; export without MTP")
        elif moe is None or not isinstance(a, MLAConfig) or a.q_lora_rank is None:
            found.append("its MTP needs MoE and queries of low rank; export without MTP")
    return found


def export_gguf(
    config: ModelConfig,
    weights: Weights,
    file: Path | str,
    tokenizer: Tokenizer | None,
    *,
    kind: str = "f16",
    mtp: bool = False,
    name: str = "fathom",
) -> Path:
    """Write one GGUF file, complete or absent.

    weights: as in `huggingface.export`. kind: f32, f16, bf16 or q8_0 for matrices; norms, routers and biases stay
    float32, and matrices whose rows are no multiple of 32 are f16 in a q8_0 file. mtp: with the MTP layer as `nextn`
    tensors. Memory: the experts' stack of one layer.

    ConfigError: a model or tokenizer that llama.cpp has no place for, an unknown option. CheckpointError: weights of
    another model, a file that is there already, a disk that refuses. DependencyError: the package gguf is missing.
    """
    if kind not in TYPES:
        raise ConfigError(f"the type is {kind}; possible are {', '.join(TYPES)}")
    gguf = _package()
    check_weights(config, weights)
    check_vocabulary(config, tokenizer)
    made = plan(config, weights, mtp)
    vocabulary = _vocabulary(tokenizer, made.config)
    if config.rms_norm_eps != 1e-6 and isinstance(config.attention, MLAConfig):
        log.warning(
            "llama.cpp's latent norms take rms_norm_eps %g, and here 1e-6; train with rms_norm_eps: 1e-6",
            config.rms_norm_eps,
        )

    def write(hidden: Path) -> None:
        writer = gguf.GGUFWriter(hidden, made.architecture)
        writer.add_name(name)
        writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[kind]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in facts(made).items():
            _add(gguf, writer, key.format(arch=made.architecture), value)
        for key, value in vocabulary.items():
            _add(gguf, writer, f"tokenizer.{key}", value)
        _write_tensors(gguf, writer, made, weights, kind)
        writer.close()

    return whole_file(Path(file), write)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise DependencyError(
            'GGUF files are written with the package gguf, which is not installed: pip install "fathom-lm[hub]"'
        ) from None
    return gguf


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    """Add one fact under the type that llama.cpp reads it with: whole numbers are uint32, numbers float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# --- facts ------------------------------------------------------------


def facts(made: Plan) -> dict[str, Any]:
    """The header: what llama.cpp calls hyperparameters, `{arch}` standing for the architecture."""
    config, a = made.config, made.config.attention
    depths = config.mtp.num_nextn_predict_layers
    found: dict[str, Any] = {
        "{arch}.vocab_size": config.vocab_size,
        "{arch}.block_count": config.num_hidden_layers + depths,
        "{arch}.context_length": config.max_position_embeddings,
        "{arch}.embedding_length": config.hidden_size,
        "{arch}.feed_forward_length": made.keys["intermediate_size"],
        "{arch}.attention.head_count": a.num_attention_heads,
        "{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "{arch}.rope.freq_base": float(a.rope_theta),
        "{arch}.rope.dimension_count": a.rotary_dim(config.hidden_size),
        **_attention_facts(config),
        **_rope_facts(config),
        **{"deepseek2": _deepseek_facts, "llama": _mixtral_facts, "ernie4_5-moe": _ernie_facts}[made.architecture](
            made
        ),
    }
    if depths:
        found["{arch}.nextn_predict_layers"] = depths
    return found


def _attention_facts(config: ModelConfig) -> dict[str, Any]:
    a = config.attention
    if not isinstance(a, MLAConfig):
        head = a.size(config.hidden_size)
        return {
            "{arch}.attention.head_count_kv": a.num_key_value_heads,
            "{arch}.attention.key_length": head,
            "{arch}.attention.value_length": head,
        }
    return {  # absorbed, MLA is attention with one key-value head as wide as what the cache keeps
        "{arch}.attention.head_count_kv": 1,
        "{arch}.attention.q_lora_rank": a.q_lora_rank or 0,
        "{arch}.attention.kv_lora_rank": a.kv_lora_rank,
        "{arch}.attention.key_length": a.kv_lora_rank + a.qk_rope_head_dim,
        "{arch}.attention.value_length": a.kv_lora_rank,
        "{arch}.attention.key_length_mla": a.qk_nope_head_dim + a.qk_rope_head_dim,
        "{arch}.attention.value_length_mla": a.v_head_dim,
    }


def _rope_facts(config: ModelConfig) -> dict[str, Any]:
    scaling = config.attention.rope_scaling
    if scaling is None or scaling.factor == 1:
        return {}
    found = {
        "{arch}.rope.scaling.type": "yarn",
        "{arch}.rope.scaling.factor": float(scaling.factor),
        "{arch}.rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "{arch}.rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
        "{arch}.rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
    }
    if isinstance(config.attention, MLAConfig):
        found["{arch}.rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    return found


def _deepseek_facts(made: Plan) -> dict[str, Any]:
    k, sigmoid = made.keys, made.keys["scoring_func"] == "sigmoid"
    found = {
        "{arch}.leading_dense_block_count": min(k["first_k_dense_replace"], made.config.num_hidden_layers),
        "{arch}.expert_count": k["n_routed_experts"],
        "{arch}.expert_used_count": k["num_experts_per_tok"],
        "{arch}.expert_shared_count": k["n_shared_experts"],
        "{arch}.expert_feed_forward_length": k["moe_intermediate_size"],
        "{arch}.expert_weights_scale": float(k["routed_scaling_factor"]),
        "{arch}.expert_weights_norm": bool(k["norm_topk_prob"]),
        "{arch}.expert_gating_func": 2 if sigmoid else 1,
    }
    if k["n_group"] > 1:
        found["{arch}.expert_group_count"] = k["n_group"]
        found["{arch}.expert_group_used_count"] = k["topk_group"]
    return found


def _mixtral_facts(made: Plan) -> dict[str, Any]:
    if mixture(made.config) is None:
        return {}
    return {
        "{arch}.expert_count": made.keys["num_local_experts"],
        "{arch}.expert_used_count": made.keys["num_experts_per_tok"],
    }


def _ernie_facts(made: Plan) -> dict[str, Any]:
    k = made.keys
    return {
        "{arch}.leading_dense_block_count": min(moe_layers(made.config)),
        "{arch}.interleave_moe_layer_step": 1,
        "{arch}.expert_count": k["moe_num_experts"],
        "{arch}.expert_used_count": k["moe_k"],
        "{arch}.expert_feed_forward_length": k["moe_intermediate_size"],
        "{arch}.expert_shared_count": k["moe_num_shared_experts"],
        "{arch}.expert_shared_feed_forward_length": k["moe_num_shared_experts"] * k["moe_intermediate_size"],
    }


# --- tensors ------------------------------------------------------------


def tensors(made: Plan, weights: Weights) -> Stream:
    """(name in GGUF, tensor), experts of a layer stacked."""
    experts, copies = 0, made.family.copies(made.config)
    if mixture(made.config) is not None and made.config.moe is not None:
        experts = made.config.moe.n_routed_experts
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in made.family.outward(made.config, made.keys, weights):
        if name in copies:
            continue  # llama.cpp takes the embedding where there is no other
        if name.endswith(".self_attn.kv_b_proj.weight"):
            yield from _latent(made.config, gguf_name(name).removesuffix("attn_kv_b.weight"), tensor)
        elif ".experts." in name:
            stack = gguf_name(name)
            stacks.setdefault(stack, []).append(tensor)
            if len(stacks[stack]) == experts:
                yield stack, torch.stack(stacks.pop(stack))
        else:
            yield gguf_name(name), tensor.flatten() if name.endswith(BIAS) else tensor


def _latent(config: ModelConfig, block: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """kv_b (N (H + V), C) -> k_b (N, C, H), which carries a query into the latent, and v_b (N, V, C)."""
    a = config.attention
    assert isinstance(a, MLAConfig)
    heads = tensor.unflatten(0, (a.num_attention_heads, a.qk_nope_head_dim + a.v_head_dim))
    key, value = heads.split((a.qk_nope_head_dim, a.v_head_dim), dim=1)
    yield f"{block}attn_k_b.weight", key.transpose(1, 2)
    yield f"{block}attn_v_b.weight", value


def _type_of(gguf: Any, name: str, shape: torch.Size, kind: str) -> Any:
    """The type of a tensor's numbers in the file."""
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return types.F32
    if kind == "q8_0" and shape[-1] % 32:
        return types.F16
    return getattr(types, TYPES[kind])


def _write_tensors(gguf: Any, writer: Any, made: Plan, weights: Weights, kind: str) -> None:
    import numpy as np

    sizes = {name: t.shape for name, t in tensors(made, blank_weights(made.config))}
    types = {name: _type_of(gguf, name, shape, kind) for name, shape in sizes.items()}
    for name, shape in sizes.items():
        block, wide = gguf.GGML_QUANT_SIZES[types[name]]
        stored = np.dtype(np.float32)
        writer.add_tensor_info(
            name,
            (*shape[:-1], shape[-1] // block * wide) if types[name] == gguf.GGMLQuantizationType.Q8_0 else tuple(shape),
            np.dtype(np.uint8) if types[name] == gguf.GGMLQuantizationType.Q8_0 else stored,
            math.prod(shape) // block * wide,
            raw_dtype=types[name],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors(made, weights):
        full = tensor.detach().cpu().float().contiguous()
        if types[name] == gguf.GGMLQuantizationType.F16 and float(full.abs().max()) > HALF_MAX:
            raise ConfigError(f"{name} has numbers beyond {HALF_MAX:g}, the largest of float16; export bf16 or f32")
        writer.write_tensor_data(gguf.quants.quantize(full.numpy(), types[name]))


# --- tokenizer ------------------------------------------------------------


def _vocabulary(tokenizer: Tokenizer | None, config: ModelConfig) -> Mapping[str, Any]:
    """The tokenizer in GGUF's words. ConfigError: there is none, or it splits text in a way llama.cpp does not know."""
    if tokenizer is None:
        raise ConfigError("a GGUF file needs the model's tokenizer (llama.cpp's server crashes without); export to hf")
    pre = pre_tokenizer(tokenizer)
    if pre is None:
        raise ConfigError(
            "the tokenizer is no byte-level BPE whose splitting rule llama.cpp knows (gpt-2, deepseek-v3, llama-bpe, "
            "qwen2); export to hf, or train with tokenizer.kind: bpe"
        )
    whole = json.loads(tokenizer.backend.to_str())
    size = config.vocab_size or tokenizer.vocab_size
    names, kinds = [f"[PAD{i}]" for i in range(size)], [5] * size  # unused
    for text, number in whole["model"]["vocab"].items():
        names[number], kinds[number] = text, 1  # normal
    for added in whole["added_tokens"]:
        names[added["id"]], kinds[added["id"]] = added["content"], 3 if added["special"] else 4  # control, user's own
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    found: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": names,
        "ggml.token_type": kinds,
        "ggml.merges": merges or [NO_MERGE],
        "ggml.eos_token_id": tokenizer.eos_id,
        "ggml.padding_token_id": tokenizer.pad_id,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
    }
    if tokenizer.bos_id is not None:
        found["ggml.bos_token_id"] = tokenizer.bos_id
    return found
