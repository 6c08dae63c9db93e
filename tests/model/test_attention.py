from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tiny_models import (
    ATTENTIONS,
    VOCABULARY,
    WIDTH,
    GrowingCache,
    close,
    documents,
    tiny_config,
    tiny_model,
    tokens_of,
)
from torch import Tensor

from fathom.model.attention.cache import Visibility
from fathom.model.attention.causal import attend_in_blocks, suits
from fathom.model.attention.gqa import GQA, GQAConfig
from fathom.model.attention.kernel import attend, attend_plain
from fathom.model.attention.mla import MLA, MLAConfig
from fathom.model.attention.variants import build_attention
from fathom.model.rope import Rope
from fathom.model.transformer import Transformer

CPU = torch.device("cpu")


def qkv(new: int, total: int, heads: tuple[int, int], sizes: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (2, new, N, H), keys (2, total, N_kv, H) and values (2, total, N_kv, V)."""
    q = torch.randn(2, new, heads[0], sizes[0], requires_grad=True)
    k = torch.randn(2, total, heads[1], sizes[0], requires_grad=True)
    v = torch.randn(2, total, heads[1], sizes[1], requires_grad=True)
    return q, k, v


def agree(fast: Tensor, slow: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """The same values, and the same gradients of the inputs."""
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    pull = torch.randn_like(slow)
    torch.testing.assert_close(
        torch.autograd.grad(fast, inputs, pull), torch.autograd.grad(slow, inputs, pull), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4), (6, 10)], ids=["equal", "narrow values", "wide values"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("seen", ["row", "after a cache", "one token", "documents"])
def test_kernel_is_the_formula(sizes: tuple[int, int], heads: tuple[int, int], seen: str) -> None:
    new, total = {"row": (7, 7), "after a cache": (3, 7), "one token": (1, 7), "documents": (7, 7)}[seen]
    segments = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0, 1]]) if seen == "documents" else None
    visible = Visibility.of(new, total, segments, CPU)
    inputs = qkv(new, total, heads, sizes)
    agree(attend(*inputs, 0.3, visible), attend_plain(*inputs, 0.3, visible), inputs)


def test_float16_on_a_cpu_is_computed_in_float32() -> None:
    q, k, v = (torch.randn(1, 5, 2, 6).half() for _ in range(3))
    visible = Visibility.of(5, 5, None, CPU)
    out = attend(q, k, v, 0.4, visible)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, attend(q.float(), k.float(), v.float(), 0.4, visible).half())


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_tokens_never_see_later_ones(kind: str) -> None:
    model = tiny_model(kind, "dense").eval()
    one = tokens_of(2, 9)
    other = one.clone()
    other[:, 5] = (other[:, 5] + 1) % VOCABULARY
    a, b = model(one), model(other)
    assert torch.equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] != b[:, 5:]).any(-1).all()


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("pieces", [[9], [4, 1, 1, 3], [1] * 9])
def test_with_a_cache_it_is_the_same_function(kind: str, pieces: list[int]) -> None:
    model = tiny_model(kind, "dense").eval()
    tokens = tokens_of(2, 9)
    caches = [GrowingCache() for _ in model.layers]
    with torch.no_grad():
        parts = [model(piece, caches=caches) for piece in tokens.split(pieces, dim=1)]
        assert close(torch.cat(parts, dim=1), model(tokens))
    assert tuple(kept.shape[2] for kept in caches[0].kept) == model.config.cache_widths


@pytest.mark.parametrize("kind", [k for k in ATTENTIONS if k.startswith("mla")])
@pytest.mark.parametrize("kept_apart", [False, True])
def test_absorbed_is_expanded(kind: str, kept_apart: bool) -> None:
    config = tiny_config(kind).attention
    assert isinstance(config, MLAConfig)
    attention = MLA(config, WIDTH)
    h = torch.randn(2, 7, WIDTH, requires_grad=True)
    rope = Rope.at(torch.arange(7).expand(2, 7), config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, -1]]) if kept_apart else None
    visible = Visibility.of(7, 7, segments, CPU)
    expanded, absorbed = (attention(h, rope, visible, absorbed=path) for path in (False, True))
    assert close(absorbed, expanded)
    pull = torch.randn_like(h)
    weights = list(attention.parameters())
    for a, b in zip(*(torch.autograd.grad(y, [h, *weights], pull) for y in (absorbed, expanded)), strict=True):
        assert close(a, b, 1e-4)


def test_absorbing_is_chosen_where_it_is_cheaper() -> None:
    sizes = {
        "num_attention_heads": 2,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    attention = MLA(MLAConfig(kind="mla", **sizes), 32)
    assert attention._absorbing_is_cheaper(1, 1000)
    assert not attention._absorbing_is_cheaper(1000, 1000)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_documents_in_a_row_are_as_alone(kind: str) -> None:
    model = tiny_model(kind, "dense").eval()
    batch = documents([[4, 6], [7, 2]], padded_to=11)
    together = model(batch.tokens, batch.positions, batch.segments)
    assert together.isfinite().all()
    assert close(together[0, 4:10], model(batch.tokens[:1, 4:10])[0])
    assert close(together[1, :7], model(batch.tokens[1:, :7])[0])


def test_query_heads_of_a_group_share_a_key() -> None:
    few, many = (GQAConfig(num_attention_heads=6, num_key_value_heads=n, head_dim=4) for n in (2, 6))
    grouped, plain = GQA(few, WIDTH), GQA(many, WIDTH)
    plain.load_state_dict({
        name: w.unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1) if name[0] in "kv" else w
        for name, w in grouped.state_dict().items()
    })  # fmt: skip
    h, rope = torch.randn(2, 5, WIDTH), Rope.at(torch.arange(5)[None], 4, 100.0, None)
    visible = Visibility.of(5, 5, None, CPU)
    torch.testing.assert_close(grouped(h, rope, visible), plain(h, rope, visible))


def test_every_member_of_the_union_is_built() -> None:
    assert {build_attention(tiny_config(kind).attention, WIDTH).__class__ for kind in ATTENTIONS} == {GQA, MLA}


def test_a_cache_holds_one_document() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="segments and a cache"):
        model(tokens_of(1, 3), segments=torch.zeros(1, 3, dtype=torch.long), caches=[GrowingCache()] * 2)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"kind": "gqa", "num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 4}, "possible are 1, 2, 3, 6"),
        ({"kind": "gqa", "num_attention_heads": 6, "num_key_value_heads": 2}, "do not divide"),
        ({"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2}, "even"),
        ({"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}, "even"),
        ({**ATTENTIONS["mla"], "qk_rope_head_dim": 5}, "even"),
        ({**ATTENTIONS["mla"], "attention_bias": True}, "attention_bias"),
        (
            {**ATTENTIONS["mla_yarn"], "rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 8}},
            "more than rope",
        ),
        ({"kind": "mha"}, "kind"),
    ],
)
def test_impossible_heads_are_refused(attention: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(attention=attention)


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        Transformer(tiny_config(vocab_size=None))


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4), (4, 6)], ids=["equal", "narrow values", "wide values"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("block", [1, 4, 11, 64])
def test_attention_in_blocks_is_the_formula(sizes: tuple[int, int], heads: tuple[int, int], block: int) -> None:
    visible = Visibility.of(11, 11, None, CPU)
    inputs = qkv(11, 11, heads, sizes)
    agree(attend_in_blocks(*inputs, 0.3, block), attend_plain(*inputs, 0.3, visible), inputs)


def test_long_rows_are_trained_in_blocks_and_the_others_are_not() -> None:
    q, k = torch.randn(1, 256, 2, 6, requires_grad=True), torch.randn(1, 256, 2, 6)
    assert suits(q, k, causal=True)
    assert not suits(q, k, causal=False)
    assert not suits(q[:, :255], k[:, :255], causal=True)
    assert not suits(q[:, :1], k, causal=True)
    assert not suits(q.bfloat16(), k.bfloat16(), causal=True)
    with torch.no_grad():
        assert not suits(q, k, causal=True)
    visible = Visibility.of(256, 256, None, CPU)
    torch.testing.assert_close(attend(q, k, k, 0.3, visible), attend_plain(q, k, k, 0.3, visible), rtol=1e-4, atol=1e-5)
    pairs = Visibility.of(256, 256, torch.arange(256).div(2, rounding_mode="floor").unsqueeze(0), CPU)
    torch.testing.assert_close(attend(q, k, k, 0.3, pairs), attend_plain(q, k, k, 0.3, pairs), rtol=1e-4, atol=1e-5)
