from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_models import (
    ATTENTIONS,
    MOES,
    VOCABULARY,
    WIDTH,
    batch_of,
    close,
    documents,
    tiny_config,
    tiny_model,
    tokens_of,
)

from fathom.model.init import init_weights
from fathom.model.loss import language_model_loss
from fathom.model.transformer import ModelConfig, Transformer

EVERY = [(a, m) for a in ATTENTIONS for m in MOES]


def test_names_are_those_of_the_released_models() -> None:
    model = tiny_model("mla_low_rank", "v3", depths=1)
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    common = [f"self_attn.{n}.weight" for n in attention] + norms
    three = [f"{n}_proj.weight" for n in ("gate", "up", "down")]
    dense = common + [f"mlp.{n}" for n in three]
    experts = [
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    ]
    sparse = common + experts + [f"mlp.shared_experts.{n}" for n in three]
    own = ["enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"]
    want = ["embed_tokens.weight", "norm.weight", "lm_head.weight"]
    want += [f"layers.0.{n}" for n in dense] + [f"layers.1.{n}" for n in sparse]
    want += [f"mtp.0.{n}" for n in own] + [f"mtp.0.block.{n}" for n in sparse]
    state = model.state_dict()
    assert sorted(state) == sorted(want)
    assert state["layers.1.mlp.experts.gate_up_proj"].shape == (6, 24, WIDTH)
    assert state["layers.1.mlp.experts.down_proj"].shape == (6, WIDTH, 12)
    assert state["mtp.0.eh_proj.weight"].shape == (WIDTH, 2 * WIDTH)


def test_gqa_names_and_tying() -> None:
    names = set(tiny_model("gqa", "dense", depths=0, tie_word_embeddings=True).state_dict())
    assert {f"layers.0.self_attn.{n}_proj.weight" for n in "qkvo"} <= names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(("attention", "moe"), EVERY)
def test_every_combination_runs_and_is_a_function_of_its_tokens(attention: str, moe: str) -> None:
    model = tiny_model(attention, moe).eval()
    tokens = tokens_of(3, 7)
    logits = model(tokens)
    assert logits.shape == (3, 7, VOCABULARY)
    assert close(model(tokens[1:2]), logits[1:2])  # a row does not depend on its neighbours
    trunk = model.trunk(tokens)
    assert close(model.logits(trunk.hidden), logits, 1e-6)
    assert [r.layer for r in trunk.routing] == ([] if moe == "dense" else [1])


@pytest.mark.parametrize(("attention", "moe"), EVERY)
def test_weights_can_be_without_memory(attention: str, moe: str) -> None:
    with torch.device("meta"):
        model = Transformer(tiny_config(attention, moe))
    assert all(w.device.type == "meta" for w in [*model.parameters(), *model.buffers()])
    real = model.to_empty(device="cpu")
    init_weights(real, 0)
    tokens = tokens_of(1, 5)
    assert torch.equal(real.eval()(tokens), tiny_model(attention, moe).eval()(tokens))


@settings(max_examples=15, deadline=None)
@given(first=st.integers(1, 6), shift=st.integers(0, 9))
def test_positions_count_and_only_distances_matter(first: int, shift: int) -> None:
    model, tokens = tiny_model("mla", "dense").eval(), tokens_of(2, 7)
    with torch.no_grad():
        moved = model(tokens, positions=torch.arange(7).expand(2, 7) + shift)
        assert close(moved, model(tokens), 1e-4)
        assert close(model(tokens[:, :first]), model(tokens)[:, :first])


def test_blocks_can_be_wrapped() -> None:
    model, seen = tiny_model(depths=1), []

    def watched(block: torch.nn.Module, *arguments: object) -> object:
        seen.append(type(block).__name__)
        return block(*arguments)

    model.run_block = watched
    language_model_loss(model, batch_of())
    assert seen == ["Block", "Block", "MTPLayer"]


def test_padding_is_finite_and_uncounted() -> None:
    model, batch = tiny_model(), documents([[5], [3, 4]], padded_to=9)
    losses = language_model_loss(model, batch)
    losses.total.backward()
    assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)
    assert int(losses.routing[0].counts.sum()) == (5 + 3 + 4) * 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"moe": {"layers": [1, 8]}}, "layers count from 0 to 7"),
        ({"hidden_size": 500}, "do not divide"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"hidden_sizes": 512}, "hidden_sizes"),
        ({"rms_norm_eps": 0.0}, "greater than 0"),
    ],
)
def test_impossible_models_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(keys)
