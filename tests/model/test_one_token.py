"""All layers in one call beside one layer after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import MOES, GrowingCache, tiny_model, tokens_of
from torch import Tensor

from fathom.generate.cache import Cache, caches_for
from fathom.model import transformer
from fathom.model.attention.cache import Visibility
from fathom.model.native.build import find_compiler
from fathom.model.one_token import suits
from fathom.model.quantize import quantize_int8
from fathom.model.transformer import Transformer, Trunk

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
ALL = Visibility(None, causal=False)


def begun(model: Transformer, rows: int) -> list[Cache]:
    caches = caches_for(model.config, len(model.layers), rows, 9, torch.float32, "cpu")
    model.trunk(tokens_of(rows, 4, seed=1), caches=caches)
    return caches


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("attention", ["mla", "mla_low_rank", "mla_yarn"])
@pytest.mark.parametrize("moe", [*MOES, "dense last"])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_is_layer_after_layer(
    kind: str, attention: str, moe: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {**(MOES["v3"] or {}), "first_k_dense_replace": 0, "layers": [0]}
    model = tiny_model(attention, first if moe == "dense last" else moe).eval()
    if kind == "int8":
        quantize_int8(model)
    called = []

    def passed(tokens: Tensor) -> list[Trunk]:
        caches = begun(model, rows)
        return [model.trunk(part, caches=caches) for part in tokens.split(1, 1)]

    tokens = tokens_of(rows, 3, seed=2)
    with torch.no_grad():
        real = transformer.one_token
        monkeypatch.setattr(transformer, "one_token", lambda *given: called.append(1) or real(*given))
        at_once = passed(tokens)
        assert len(called) == 3
        monkeypatch.setattr(transformer, "suits", lambda *given: False)
        one_by_one = passed(tokens)
    for a, b in zip(at_once, one_by_one, strict=True):
        assert torch.equal(a.hidden, b.hidden)
        assert len(a.routing) == len(b.routing) == (0 if moe == "dense" else 1)
        for x, y in zip(a.routing, b.routing, strict=True):
            assert x.layer == y.layer
            assert x.real is y.real is None
            for name in ("dropped", "loss", "experts", "weights", "scores"):
                assert torch.equal(getattr(x, name), getattr(y, name)), name


def test_what_it_does_not_suit() -> None:
    model, h = tiny_model().eval(), torch.zeros(2, 1, 20)
    assert not suits(model.layers, h, ALL)  # gradients
    with torch.no_grad():
        assert suits(model.layers, h, ALL)
        assert not suits(model.layers, torch.zeros(2, 3, 20), ALL)
        assert not suits(model.layers, h.bfloat16(), ALL)
        assert not suits(model.layers, torch.zeros(65, 1, 20), ALL)
        assert not suits(model.layers, h, Visibility(torch.ones(2, 1, 1, 5, dtype=torch.bool), causal=False))
        assert not suits(tiny_model("gqa").eval().layers, h, ALL)
        assert not suits(copy.deepcopy(model).train().layers, h, ALL)
        assert not suits(copy.deepcopy(model).double().layers, h, ALL)
        for module in (model.layers[1], model.layers[0].self_attn, model.layers[1].mlp):
            hook = module.register_forward_hook(lambda *_: None)
            assert not suits(model.layers, h, ALL)
            hook.remove()
        assert suits(model.layers, h, ALL)


def test_a_cache_without_room_is_left_as_it_is() -> None:
    model, tokens = tiny_model().eval(), tokens_of(1, 5)
    with torch.no_grad():
        caches = [GrowingCache() for _ in model.layers]
        found = [model.trunk(part, caches=caches).hidden for part in tokens.split(1, 1)]
        assert torch.allclose(torch.cat(found, 1), model.trunk(tokens).hidden, atol=1e-5)
        full = caches_for(model.config, 2, 1, 4, torch.float32, "cpu")
        model.trunk(tokens[:, :4], caches=full)
        with pytest.raises(ValueError, match="holds 4 tokens, and 5"):
            model.trunk(tokens[:, 4:], caches=full)
        assert [cache.length for cache in full] == [4, 4]
