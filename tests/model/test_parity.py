"""The same weights in transformers' own DeepSeek models give the same logits and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import close, tiny_model, tokens_of

from fathom.model.transformer import ModelConfig, Transformer

transformers = pytest.importorskip("transformers")


def theirs(config: ModelConfig, family: str) -> Any:
    """transformers' model of the same architecture."""
    a, moe = config.attention, config.moe
    assert moe is not None
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.rope_scaling is not None:
        rope.update(a.rope_scaling.model_dump())
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"]
    shared = [*sizes, "rms_norm_eps", "tie_word_embeddings"]
    attention = ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    experts = ["n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"]
    mixture = [*experts, "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"]
    keys = {
        key: getattr(part, key) for part, names in ((config, shared), (a, attention), (moe, mixture)) for key in names
    }
    keys |= {"num_attention_heads": a.num_attention_heads, "num_key_value_heads": a.num_attention_heads}
    keys |= {"head_dim": keys["qk_rope_head_dim"], "rope_parameters": rope, "attention_bias": False}
    if family == "V2":
        keys["topk_method"] = moe.topk_method
    made = getattr(transformers, f"Deepseek{family}Config")(**keys)
    return getattr(transformers, f"Deepseek{family}ForCausalLM")(made).eval()


def carried(model: Transformer, family: str) -> dict[str, torch.Tensor]:
    """Our weights under their names: they differ by `model.` alone."""
    state = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in model.state_dict().items()}
    return {name: w for name, w in state.items() if family == "V3" or "e_score" not in name}


def with_bias(model: Transformer) -> Transformer:
    """Selection biases large enough to change the choice."""
    for layer in model.moe_layers().values():
        layer.gate.e_score_correction_bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(layer.layer))
    return model


MLA = {
    "kind": "mla",
    "num_attention_heads": 3,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
MOE = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
SIGMOID = {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}
CASES = {
    "V3": ("V3", {**MLA, "q_lora_rank": 7}, {**MOE, **SIGMOID, "n_group": 3, "topk_group": 2}),
    "V3 with YaRN": ("V3", {**MLA, "q_lora_rank": 7, "rope_scaling": YARN}, {**MOE, **SIGMOID}),
    "V3 with direct queries": ("V3", MLA, {**MOE, **SIGMOID, "norm_topk_prob": False}),
    "V2-Lite": ("V2", {**MLA, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
                {**MOE, "topk_method": "greedy", "norm_topk_prob": False}),
    "V2": ("V2", {**MLA, "q_lora_rank": 7, "rope_scaling": YARN},
           {**MOE, "topk_method": "group_limited_greedy", "norm_topk_prob": False, "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 16.0}),
    "V3 tied": ("V3", {**MLA, "q_lora_rank": 7}, {**MOE, **SIGMOID}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    family, attention, moe = CASES[name]
    tied = name.endswith("tied")
    keys = {"hidden_size": 24, "num_hidden_layers": 3, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5}
    model = tiny_model(attention, moe, depths=0, **keys)
    if family == "V3":
        with_bias(model)
    other = theirs(model.config, family)
    missing, unexpected = other.load_state_dict(carried(model, family), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    tokens = tokens_of(3, 17)
    ours, reference = model.train()(tokens), other(tokens, use_cache=False).logits
    assert close(ours, reference, 1e-4)
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    (ours * pull).sum().backward()
    (reference * pull).sum().backward()
    for name, weight in other.named_parameters():
        own = model.get_parameter(name.removeprefix("model."))
        assert close(own.grad, weight.grad, 1e-3), name
