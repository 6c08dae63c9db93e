"""The quick ways that a few tokens take when no gradient is wanted, beside their slow twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MOES, WIDTH, close, seeded, tiny_config
from torch import Tensor

from fathom.model.attention.cache import Visibility
from fathom.model.attention.kernel import attend, attend_plain
from fathom.model.attention.mla import MLA, MLAConfig
from fathom.model.feedforward import swiglu, swiglu_plain, weighted_swiglu, weighted_swiglu_plain
from fathom.model.moe.experts import PER_EXPERT
from fathom.model.moe.layer import MoE, MoEConfig
from fathom.model.native.kernels import FEW
from fathom.model.rope import Rope, YarnConfig

CPU = torch.device("cpu")
MOE_KINDS = [name for name, keys in MOES.items() if keys]


def test_swiglu_is_the_formula() -> None:
    gate, up, weights = seeded(5, 7), seeded(5, 7, seed=1), torch.rand(5)
    kept = gate.clone()
    with torch.no_grad():
        torch.testing.assert_close(swiglu(gate, up), swiglu_plain(gate, up))
        both = torch.cat((gate, up), dim=-1)
        torch.testing.assert_close(weighted_swiglu(both, weights), weighted_swiglu_plain(both, weights))
    assert torch.equal(gate, kept)


@settings(max_examples=40, deadline=None)
@given(
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    pairs=st.integers(1, 5),
    stretched=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_a_rotation_is_the_formula(
    before: int, after: int, pairs: int, stretched: bool, dtype: torch.dtype, seed: int
) -> None:
    """Whatever the rotary part lies between."""
    yarn = YarnConfig(factor=4.0, original_max_position_embeddings=8, mscale=0.7) if stretched else None
    rope = Rope.at(torch.tensor([[0, 5, 40], [7, 8, 9]]), 2 * pairs, 100.0, yarn)
    x = seeded(2, 3, 4, before + 2 * pairs + after, seed=seed).to(dtype)[..., before : before + 2 * pairs]
    with torch.no_grad():
        got = rope.turn(x)
        torch.testing.assert_close(got, rope.turn_plain(x))
    assert got.dtype == dtype


def lengths_hidden(rows: int, new: int, seen: int) -> Visibility:
    """As a batch of rows of different lengths sees: row i has i tokens less."""
    place = torch.arange(seen - new, seen).view(1, new, 1) - torch.arange(rows).view(rows, 1, 1)
    return Visibility((torch.arange(seen).view(1, 1, seen) <= place).unsqueeze(1), causal=False)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_one_token_attends_as_the_formula_says(heads: tuple[int, int], rows: int, masked: bool) -> None:
    visible = lengths_hidden(rows, 1, 7) if masked else Visibility(None, causal=False)
    q, k, v = seeded(rows, 1, heads[0], 6), seeded(rows, 7, heads[1], 6, seed=1), seeded(rows, 7, heads[1], 6, seed=2)
    torch.testing.assert_close(attend(q, k, v, 0.3, visible), attend_plain(q, k, v, 0.3, visible))


@pytest.mark.parametrize("kind", ["mla", "mla_low_rank", "mla_yarn"])
@pytest.mark.parametrize(("rows", "new"), [(1, 1), (1, 3), (4, 1), (3, 2)])
def test_absorbed_rows_of_different_lengths(kind: str, rows: int, new: int) -> None:
    config = tiny_config(kind).attention
    assert isinstance(config, MLAConfig)
    attention, seen = MLA(config, WIDTH), 9
    h = seeded(rows, new, WIDTH)
    rope = Rope.at(torch.arange(new).expand(rows, new), config.qk_rope_head_dim, 100.0, None)
    old = (seeded(rows, seen - new, config.kv_lora_rank, seed=1), seeded(rows, seen - new, 6, seed=2))

    class Stored:
        def append(self, *fresh: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.cat(pair, dim=1) for pair in zip(old, fresh, strict=True))

    visible = lengths_hidden(rows, new, seen)
    with torch.no_grad():
        paths = [attention(h, rope, visible, Stored(), absorbed) for absorbed in (True, False)]  # type: ignore[arg-type]
    assert close(*paths)


def moe_of(kind: str) -> MoE:
    made = MoE(MoEConfig.model_validate({**MOES[kind], "moe_intermediate_size": 12}), WIDTH, layer=1).eval()  # type: ignore[dict-item]
    for number, weight in enumerate(made.parameters()):
        weight.data.copy_(0.3 * seeded(*weight.shape, seed=number))
    return made


@pytest.mark.parametrize("kind", MOE_KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 5, FEW, FEW + 1, 384, 385])
def test_experts_are_visited_as_they_are_sorted(kind: str, tokens: int) -> None:
    moe, x = moe_of(kind), seeded(1, tokens, WIDTH, seed=tokens)
    sorted_out, told = moe(x)  # with gradients
    with torch.no_grad():
        each = tokens * moe.config.num_experts_per_tok / moe.config.n_routed_experts
        assert moe.experts.takes(x[0], moe.config.num_experts_per_tok) == (each <= PER_EXPERT)
        visited, report = moe(x)
        again, _ = moe(x)
    assert close(visited, sorted_out)
    assert torch.equal(visited, again)
    assert torch.equal(report.counts, told.counts)
    assert torch.equal(report.experts, told.experts)


def test_gradients_and_other_dtypes_are_sorted() -> None:
    routed, x = moe_of("v3").experts, seeded(3, WIDTH)
    assert not routed.takes(x, 2)
    with torch.no_grad():
        assert routed.takes(x, 2)
        assert not routed.takes(x.double(), 2)
        assert not routed.takes(x.bfloat16(), 2)


def test_nobody_is_moved_by_other_rows() -> None:
    moe, x = moe_of("v3"), seeded(1, 5, WIDTH)
    with torch.no_grad():
        alone, _ = moe(x[:, :1])
        x[:, 1:] = float("nan")
        beside, _ = moe(x)
    assert close(alone, beside[:, :1])
