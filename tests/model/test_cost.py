from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ATTENTIONS, MOES, batch_of, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from fathom.errors import ConfigError
from fathom.model.cost import Cost
from fathom.model.loss import language_model_loss
from fathom.model.transformer import ModelConfig, Transformer


def released(**keys: Any) -> ModelConfig:
    """A released model, from the numbers in which they differ."""
    heads = {"num_attention_heads": keys.pop("heads"), "q_lora_rank": keys.pop("query_rank"), "kv_lora_rank": 512}
    attention = {"kind": "mla", **heads, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    return ModelConfig.model_validate({"attention": attention, **keys})


SEED = ModelConfig.model_validate(
    {"vocab_size": 50257, "tie_word_embeddings": True, "moe": {"layers": [2, 4, 6], "capacity_factor": 2.0}}
)
V2_LITE = released(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, heads=16, query_rank=None,
    moe={"first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
         "moe_intermediate_size": 1408},
)  # fmt: skip
V2 = released(
    vocab_size=102400, hidden_size=5120, intermediate_size=12288, num_hidden_layers=60, heads=128, query_rank=1536,
    moe={"first_k_dense_replace": 1, "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6,
         "moe_intermediate_size": 1536},
)  # fmt: skip
V3 = released(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, heads=128, query_rank=1536,
    moe={"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
         "moe_intermediate_size": 2048},
    mtp={"num_nextn_predict_layers": 1},
)  # fmt: skip


def test_the_seed() -> None:
    cost = Cost(SEED)
    assert cost.parameters() == 84_466_688
    assert cost.active_parameters() == 65_592_320


@pytest.mark.parametrize(
    ("config", "billions", "active", "cache"),
    [(V2_LITE, 15.706, 2.451, 31_104), (V2, 235.74, 20.85, 69_120), (V3, 671.03, 36.63, 70_272)],
    ids=["V2-Lite", "V2", "V3"],
)
def test_released_models(config: ModelConfig, billions: float, active: float, cache: int) -> None:
    cost = Cost(config)
    assert cost.parameters() / 1e9 == pytest.approx(billions, abs=0.005)
    assert cost.active_parameters() / 1e9 == pytest.approx(active, abs=0.005)
    assert cost.cache_bytes_per_token() == cache
    with torch.device("meta"):
        model = Transformer(config)
    assert cost.parameters() + cost.mtp_parameters() == sum(w.numel() for w in model.parameters())


def test_mtp_of_v3_is_told_apart() -> None:
    assert Cost(V3).mtp_parameters() / 1e9 == pytest.approx(11.6, abs=0.05)


@pytest.mark.parametrize(
    ("config", "mha", "gqa"), [(V2_LITE, 110_592, 55_296), (V2, 1_966_080, 122_880), (V3, 1_998_848, 124_928)]
)
def test_cache_of_the_other_kinds(config: ModelConfig, mha: int, gqa: int) -> None:
    cost = Cost(config)
    numbers = cost.cache_comparison(dtype_bytes=1)
    assert numbers == {"mla": cost.cache_bytes_per_token(1), "gqa": gqa, "mha": mha}


def test_the_seeds_own_kind_is_as_it_is() -> None:
    assert Cost(SEED).cache_comparison() == {"mla": 4608, "gqa": Cost(SEED).cache_bytes_per_token(), "mha": 16384}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("moe", MOES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_modules(attention: str, moe: str, tied: bool) -> None:
    config = tiny_config(attention, moe, depths=2, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(config)
    ahead = sum(w.numel() for w in model.mtp.parameters())
    cost = Cost(config)
    assert cost.mtp_parameters() == ahead
    assert cost.parameters() == sum(w.numel() for w in model.parameters()) - ahead
    idle = 0
    for number, layer in model.moe_layers().items():
        if number < config.num_hidden_layers:
            each = sum(w.numel() for w in layer.experts.parameters()) // layer.config.n_routed_experts
            idle += each * (layer.config.n_routed_experts - layer.config.num_experts_per_tok)
    embedding = 0 if tied else model.embed_tokens.weight.numel()
    assert cost.active_parameters() == cost.parameters() - idle - embedding


@pytest.mark.parametrize("attention", ["gqa", "mla", "mla_low_rank"])
@pytest.mark.parametrize("depths", [0, 1])
def test_flops_are_those_that_torch_counts(attention: str, depths: int) -> None:
    """Linear layers and grouped experts exactly; of attention, torch counts padded heads and the triangle's empty
    half too."""
    config = tiny_config(attention, "dense", depths=depths)
    model, length = tiny_model(attention, "dense", depths=depths), 7
    added = {
        torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]
    }  # the head's gradient, which torch forgets
    with FlopCounterMode(display=False, custom_mapping=added) as counter:
        language_model_loss(model, batch_of(1, length)).total.backward()
    scores = ("attention", "bmm")
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if not any(s in str(op) for s in scores))
    cost = Cost(config)
    per_depth = 2 * cost.mtp().used / max(1, depths) + 2 * cost.vocabulary * config.hidden_size
    want = 3 * (2 * cost.trunk().used * length + depths * per_depth * (length - 1))
    assert products == want
    total = cost.training_flops_per_token(length) * length
    layers = config.num_hidden_layers + depths
    assert total == 3 * (
        2 * cost.trunk().used * length
        + depths * per_depth * length
        + layers * cost.score_flops((length + 1) / 2) * length
    )


def test_flops_of_a_token_grow_with_its_context() -> None:
    cost = Cost(SEED)
    assert cost.flops_per_token(1) == pytest.approx(2 * 65_592_320, rel=1e-3)
    assert cost.flops_per_token(513) - cost.flops_per_token(1) == 8 * 2 * 512 * 8 * 2 * 64


def kept_bytes(config: ModelConfig, rows: int, length: int, narrow: bool) -> int:
    """What autograd really holds between forward and backward, weights left out."""
    model = Transformer(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0, 0.02)
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    shapes = {tuple(w.shape) for w in model.parameters()}
    held: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        cast = tuple(x.shape) in shapes or tuple(x.shape)[::-1] in shapes or (x.dim() == 3 and x.shape[0] == 8)
        if storage.data_ptr() not in weights and not cast:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=narrow),
    ):
        losses = language_model_loss(model, batch_of(rows, length))
    assert losses.total.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("moe", ["dense", "v3"])
@pytest.mark.parametrize("narrow", [False, True])
def test_activations_are_estimated_closely(attention: str, moe: str, narrow: bool) -> None:
    heads = {
        "gqa": {"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2},
        "mla": {"kind": "mla", "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 40, "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8, "v_head_dim": 16},
    }[attention]  # fmt: skip
    experts = {**MOES["v3"], "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 40}  # type: ignore[dict-item]
    config = tiny_config(heads, experts if moe == "v3" else "dense", depths=1, hidden_size=64, intermediate_size=168)
    rows, length = 5, 67
    want = kept_bytes(config, rows, length, narrow)
    got = Cost(config).activation_bytes(rows * length, "bfloat16" if narrow else "float32")
    assert got == pytest.approx(want, rel=0.06)


def test_memory_of_a_step() -> None:
    cost = Cost(SEED)
    full = cost.training_memory(4, 512)
    assert full.weights == full.gradients == 4 * 84_466_688
    assert full.optimizer == 8 * 84_466_688
    assert full.total == full.weights + full.gradients + full.optimizer + full.activations + full.logits
    mixed = cost.training_memory(4, 512, "bfloat16")
    assert mixed.weights == 6 * 84_466_688
    assert mixed.activations < 0.7 * full.activations
    assert cost.training_memory(4, 512, recompute=True).activations < 0.4 * full.activations
    muon = cost.training_memory(4, 512, optimizer="muon").optimizer
    assert 4 * 84_466_688 < muon < 8 * 84_466_688
    assert cost.training_memory(8, 512).activations == 2 * full.activations


def test_a_size_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is null"):
        Cost(ModelConfig())
