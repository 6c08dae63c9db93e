"""Training in float8, with the roundings of the tensor cores emulated."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_models import close, tiny_model, tokens_of

from fathom.errors import DependencyError
from fathom.model.float8 import Float8Recipe, train_in_float8
from fathom.model.linear import Linear
from fathom.model.transformer import Transformer

RECIPES: list[Float8Recipe] = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
MLA16 = {"kind": "mla", "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
         "qk_rope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
MOE16 = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
         "first_k_dense_replace": 1}  # fmt: skip


def model_of(depths: int = 0) -> Transformer:
    return tiny_model(MLA16, MOE16, depths, hidden_size=32, intermediate_size=48, initializer_range=0.1).train()


def loss_of(model: Transformer) -> torch.Tensor:
    tokens = tokens_of(2, 9)
    return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_the_same_up_to_three_bits(recipe: Float8Recipe) -> None:
    pytest.importorskip("torchao")
    plain, narrow = model_of(), model_of()
    # of two layers: q_a, q_b, kv_b, o and three of the dense or the shared network; kv_a has 24 rows
    assert train_in_float8(narrow, recipe, emulate=True) == 14
    assert plain.state_dict().keys() == narrow.state_dict().keys()
    losses = [loss_of(model) for model in (plain, narrow)]
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.05 * losses[0]
    for loss in losses:
        loss.backward()
    for name in ("embed_tokens.weight", "layers.1.mlp.gate.weight", "layers.0.self_attn.kv_b_proj.weight"):
        found = [dict(model.named_parameters())[name].grad for model in (plain, narrow)]
        assert found[0] is not None
        assert found[1] is not None
        assert not torch.equal(*found)
        assert close(found[1], found[0], 0.5), name
    with torch.no_grad():
        tokens = tokens_of(2, 5)
        assert torch.equal(plain.eval()(tokens), narrow.eval()(tokens))  # the plain weights


def test_matrices_of_other_sizes_and_heads_stay() -> None:
    pytest.importorskip("torchao")
    model = tiny_model("mla", "v3")  # widths of 20
    assert train_in_float8(model, "tensorwise", emulate=True) == 0
    model = model_of(1)
    train_in_float8(model, "tensorwise", emulate=True)
    ways = {name: part.trained_by for name, part in model.named_modules() if isinstance(part, Linear)}
    assert ways["mtp.0.eh_proj"] is not None
    assert all(way is None for name, way in ways.items() if "head" in name)


def test_a_weight_that_was_replaced_is_used() -> None:
    pytest.importorskip("torchao")
    model = model_of()
    train_in_float8(model, "rowwise", emulate=True)
    before = loss_of(model)
    part = model.layers[0].self_attn.o_proj
    part.weight = torch.nn.Parameter(2 * part.weight.detach())
    after = loss_of(model)
    assert after != before
    after.backward()
    assert part.weight.grad is not None


def test_it_learns() -> None:
    pytest.importorskip("torchao")
    model = model_of(1)
    train_in_float8(model, "tensorwise", emulate=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = loss_of(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < 0.3 * first


def test_without_torchao_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(DependencyError, match=r"pip install 'fathom-lm\[float8\]'"):
        train_in_float8(model_of(), "tensorwise")
