"""All layers in one call beside one layer after the other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_models import MOES, GrowingCache, close, tiny_model, tokens_of
from torch import Tensor, nn

from fathom.generate.cache import Cache, caches_for
from fathom.model.attention.cache import LayerCache
from fathom.model.native import build, kernels
from fathom.model.native.build import find_compiler
from fathom.model.one_token import OneToken
from fathom.model.precision import compute_dtype
from fathom.model.quantize import quantize_int8
from fathom.model.transformer import Transformer, Trunk
from fathom.serve.paged_cache import Pages

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
KINDS = ["float32", "bfloat16", "int8", "int8 of bfloat16"]


def kept_as(model: Transformer, kind: str) -> Transformer:
    """Its weights in this form."""
    model = model.eval()
    if "bfloat16" in kind:
        model = model.bfloat16()
    return quantize_int8(model) if kind.startswith("int8") else model


def begun(model: Transformer, rows: int) -> list[Cache]:
    weight = model.embed_tokens.weight
    caches = caches_for(model.config, len(model.layers), rows, 9, compute_dtype(weight), "cpu")
    model.trunk(tokens_of(rows, 4, seed=1), caches=caches)
    return caches


class Noted(OneToken):
    """Notes whether the layers went in one call."""

    def __init__(self, allowed: bool = True) -> None:
        super().__init__()
        self.allowed = allowed
        self.went: list[bool] = []

    def __call__(self, *given: Any) -> Any:
        found = super().__call__(*given) if self.allowed else None
        self.went.append(found is not None)
        return found


def same(a: Trunk, b: Trunk, moe: bool) -> None:
    assert a.hidden.dtype == b.hidden.dtype == torch.float32
    assert torch.equal(a.hidden, b.hidden)
    assert len(a.routing) == len(b.routing) == int(moe)
    for x, y in zip(a.routing, b.routing, strict=True):
        assert x.layer == y.layer
        assert x.real is y.real is None
        for name in ("dropped", "loss", "experts", "weights", "scores"):
            assert torch.equal(getattr(x, name), getattr(y, name)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["mla", "mla_low_rank", "mla_yarn"])
@pytest.mark.parametrize("moe", [*MOES, "dense last"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_it_is_layer_after_layer(kind: str, attention: str, moe: str, rows: int) -> None:
    first = {**(MOES["v3"] or {}), "first_k_dense_replace": 0, "layers": [0]}
    model = kept_as(tiny_model(attention, first if moe == "dense last" else moe), kind)
    tokens = tokens_of(rows, 3, seed=2)

    def passed(way: Noted) -> list[Trunk]:
        model._one_token = way
        caches = begun(model, rows)
        return [model.trunk(part, caches=caches) for part in tokens.split(1, 1)]

    way = Noted()
    for a, b in zip(passed(way), passed(Noted(allowed=False)), strict=True):
        same(a, b, moe != "dense")
    assert way.went == [False, True, True, True]  # the first is the beginning


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_of_different_lengths_in_scattered_blocks(kind: str, kept: torch.dtype) -> None:
    model = kept_as(tiny_model("mla", "v3"), kind)
    tables, starts = [[7, 2, 3], [5], [0, 6]], [5, 0, 3]  # blocks of two tokens
    tokens = tokens_of(3, 1, seed=2)

    def passed(way: Noted) -> tuple[Trunk, Pages]:
        pages = Pages(model.config.cache_widths, len(model.layers), 8, 2, kept, "cpu")
        for number, page in enumerate(pages.layers):
            page.copy_(0.3 * torch.randn(page.shape, generator=torch.Generator().manual_seed(number)))
        model._one_token, rows = way, pages.rows(tables, starts, [1, 1, 1])
        caches: Sequence[LayerCache] = pages.view(range(len(model.layers)), rows)
        return model.trunk(tokens, rows.places, caches=caches, real=rows.real), pages

    (a, written), (b, known) = passed(Noted()), passed(Noted(allowed=False))
    same(a, b, True)
    for x, y in zip(written.layers, known.layers, strict=True):
        assert torch.equal(x, y)


def test_what_it_does_not_suit() -> None:
    model, h = tiny_model().eval(), torch.zeros(2, 1, 20)

    def goes(model: Transformer = model, h: Tensor = h) -> bool:
        caches = caches_for(model.config, 2, len(h), 4, torch.float32, "cpu")
        rope = model.rope(torch.zeros(len(h), h.shape[1], dtype=torch.int64))
        done = OneToken()(model.layers, h, rope, caches, None) is not None
        assert [cache.length for cache in caches] == [int(done)] * 2
        return done

    assert not goes()  # gradients
    with torch.no_grad():
        assert goes()
        assert not goes(h=torch.zeros(2, 3, 20))
        assert not goes(h=h.bfloat16())
        assert not goes(h=torch.zeros(65, 1, 20))
        assert not goes(tiny_model("gqa").eval())
        assert not goes(copy.deepcopy(model).train())
        assert not goes(copy.deepcopy(model).double())


def cast(model: Transformer) -> None:
    model.bfloat16()


def moved(model: Transformer) -> None:
    weight = model.layers[0].self_attn.o_proj.weight
    weight.data = 2 * weight.data


def replaced(model: Transformer) -> None:
    shared = model.layers[1].mlp.shared_experts
    shared.up_proj = copy.deepcopy(shared.up_proj)
    shared.up_proj.weight.mul_(3)


def assigned(model: Transformer) -> None:
    model.load_state_dict({name: 0.5 * part for name, part in model.state_dict().items()}, assign=True)


def of_other_eps(model: Transformer) -> None:
    for block in model.layers:
        block.input_layernorm.eps = block.post_attention_layernorm.eps = 0.5


def chosen_otherwise(model: Transformer) -> None:
    model.layers[1].mlp.gate.k = 1


def scaled(model: Transformer) -> None:
    model.layers[1].mlp.gate.scale = 3.0


def one_eps(model: Transformer) -> None:
    model.layers[1].input_layernorm.eps = 0.5


def one_layer_cast(model: Transformer) -> None:
    model.layers[1].bfloat16()


def one_norm_cast(model: Transformer) -> None:
    norm = model.layers[0].self_attn.kv_a_layernorm
    norm.weight.mul_(1.3)
    norm.bfloat16()


def one_matrix_cast(model: Transformer) -> None:
    model.layers[0].mlp.gate_proj.bfloat16()
    model.layers[0].self_attn.kv_a_proj_with_mqa.bfloat16()
    model.layers[1].mlp.shared_experts.bfloat16()


def by_heads_cast(model: Transformer) -> None:
    model.layers[1].self_attn.kv_b_proj.bfloat16()


def router_cast(model: Transformer) -> None:
    model.layers[1].mlp.gate.bfloat16()


def transposed(model: Transformer) -> None:
    for part in (model.layers[0].self_attn.o_proj, model.layers[0].mlp.up_proj):
        part.weight.data = 2 * part.weight.data.T.contiguous().T


def forward_patched(model: Transformer) -> None:
    attention = model.layers[0].self_attn
    plain = attention.forward
    attention.forward = lambda *given, **named: 2 * plain(*given, **named)


def norm_listened_to(model: Transformer) -> None:
    model.layers[0].input_layernorm.register_forward_hook(lambda _, __, out: 2 * out)


def changed(model: Transformer) -> None:
    model.layers[0].mlp.down_proj.weight.mul_(3)


CHANGES: list[Callable[[Transformer], object]] = [
    cast, moved, replaced, assigned, changed, quantize_int8, of_other_eps, chosen_otherwise, scaled, one_eps,
    one_layer_cast, one_norm_cast, one_matrix_cast, by_heads_cast, router_cast, transposed, forward_patched,
    norm_listened_to,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_changes_is_found_anew(change: Callable[[Transformer], object]) -> None:
    model, tokens = tiny_model("mla", "v3").eval(), tokens_of(2, 1, seed=2)
    before = model.trunk(tokens, caches=begun(model, 2)).hidden
    change(model)
    after = model.trunk(tokens, caches=begun(model, 2)).hidden
    model._one_token = Noted(allowed=False)
    assert torch.equal(after, model.trunk(tokens, caches=begun(model, 2)).hidden)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_changes_is_computed_as_without_kernels(
    change: Callable[[Transformer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights kept in several ways, hooks and patches: nothing is read as what it is not."""
    model, tokens = tiny_model("mla", "v3").eval(), tokens_of(2, 3, seed=2)
    change(model)
    quick = [model(part, caches=begun(model, 2)) for part in (tokens, tokens[:, :1])]
    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.setattr(kernels, "library", lambda: None)
    slow = [model(part, caches=begun(model, 2)) for part in (tokens, tokens[:, :1])]
    for a, b in zip(quick, slow, strict=True):
        assert close(a.float(), b.float(), 0.05)


def test_other_rows_than_the_caches() -> None:
    model = tiny_model().eval()
    with torch.no_grad(), pytest.raises(ValueError, match="the cache has 1 rows, and 3 tokens came"):
        model.trunk(tokens_of(3, 1), caches=begun(model, 1))


@torch.no_grad()
def test_listeners_are_called() -> None:
    model, tokens, heard = tiny_model().eval(), tokens_of(1, 1), []
    model.trunk(tokens, caches=begun(model, 1))
    listened: list[nn.Module] = [model.layers[1], model.layers[0].self_attn, model.layers[1].mlp]
    for module in listened:
        caches, hook = begun(model, 1), module.register_forward_hook(lambda *_: heard.append(1))
        model.trunk(tokens, caches=caches)
        hook.remove()
    assert heard == [1] * 3


def test_a_copy_knows_nothing() -> None:
    model, tokens = tiny_model().eval(), tokens_of(1, 1)
    with torch.no_grad():
        expected = model.trunk(tokens, caches=begun(model, 1)).hidden
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other._one_token._found is None
            model.embed_tokens.weight.zero_()
            assert torch.equal(other.trunk(tokens, caches=begun(other, 1)).hidden, expected)
            model.embed_tokens.weight.copy_(other.embed_tokens.weight)


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
