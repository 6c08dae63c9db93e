from __future__ import annotations

import pytest
import torch
from tiny_models import MOES, tiny_config, tiny_model

from fathom.model.init import init_weights
from fathom.model.transformer import Transformer


def wide_model(**changes: object) -> Transformer:
    moe = {**MOES["v3"], "moe_intermediate_size": 64, "router_initializer_range": 0.07}  # type: ignore[dict-item]
    keys = {"hidden_size": 128, "intermediate_size": 96, "vocab_size": 200, "initializer_range": 0.02}
    model = Transformer(tiny_config(moe=moe, **{**keys, **changes}))
    init_weights(model, 0)
    return model


def test_every_weight_is_drawn_as_the_table_says() -> None:
    model = wide_model()
    assert len(model.mtp) == 1
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        want = 0.02
        if name.endswith("mlp.gate.weight"):
            want = 0.07
        elif "o_proj" in name or "down_proj" in name:
            want = 0.02 / 4**0.5
        assert weight.std().item() == pytest.approx(want, rel=5 / weight.numel() ** 0.5), name
        assert abs(weight.mean().item()) < 5 * want / weight.numel() ** 0.5, name
    assert not any(b.any() for b in model.buffers())


def test_depth_awareness_is_a_knob() -> None:
    model = wide_model(depth_aware_init=False)
    assert model.layers[0].self_attn.o_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_same_seed_same_weights_and_another_seed_others() -> None:
    one, again, other = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    for a, b, c in zip(one.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)


def test_a_weight_does_not_depend_on_other_parts() -> None:
    with_mtp, dense = tiny_model(depths=1), tiny_model(moe="dense", depths=0)
    pairs = {name: w for name, w in dense.named_parameters() if name in dict(with_mtp.named_parameters())}
    assert "layers.1.self_attn.o_proj.weight" in pairs
    assert all(torch.equal(w, with_mtp.get_parameter(name)) for name, w in pairs.items())


def test_no_two_weights_are_alike() -> None:
    model = tiny_model()
    same_shape = [model.get_parameter(f"layers.{i}.self_attn.o_proj.weight") for i in (0, 1)]
    assert not torch.equal(*same_shape)
