from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_models import MOES, WIDTH, close
from torch import Tensor

from fathom.model.moe.dispatch import route, sort_weights
from fathom.model.moe.layer import MoE, MoEConfig, within_capacity

MOE_KINDS = [name for name, keys in MOES.items() if keys]


def layer(name: str, **changes: object) -> MoE:
    config = MoEConfig.model_validate({**MOES[name], **changes})  # type: ignore[dict-item]
    made = MoE(config, WIDTH, layer=1)
    draw = torch.Generator().manual_seed(3)
    for weight in made.parameters():
        weight.data.normal_(0, 0.3, generator=draw)
    made.gate.e_score_correction_bias.normal_(0, 0.2, generator=draw)
    return made


def network(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ down.T


def token_by_token(moe: MoE, x: Tensor, fits: Tensor | None = None) -> Tensor:
    """The equation of layer.py's head, a token at a time: the slow twin of the whole layer. fits (B T, K): what is
    not dropped."""
    flat = x.flatten(0, 1)
    choice = moe.gate(flat)
    rows = []
    for t, token in enumerate(flat):
        y = torch.zeros_like(token) if moe.shared_experts is None else moe.shared_experts(token)
        for slot, expert in enumerate(choice.experts[t].tolist()):
            if fits is None or fits[t, slot]:
                y = y + choice.weights[t, slot] * network(
                    token, moe.experts.gate_up_proj[expert], moe.experts.down_proj[expert]
                )
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("kind", MOE_KINDS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_layer_is_the_equation(kind: str, implementation: str) -> None:
    moe = layer(kind, experts_implementation=implementation, moe_intermediate_size=12, capacity_factor=None)
    x = torch.randn(2, 7, WIDTH, requires_grad=True)
    (fast, report), slow = moe(x), token_by_token(moe, x)
    assert close(fast, slow)
    assert int(report.counts.sum()) == 2 * 7 * moe.config.num_experts_per_tok
    assert int(report.dropped) == 0
    pull = torch.randn_like(x)
    weights = [x, *moe.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, weights, pull, retain_graph=True) for y in (fast, slow)), strict=True):
        assert close(a, b, 1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_filled_up_rows_change_nothing(implementation: str) -> None:
    moe = layer("seed", experts_implementation=implementation, moe_intermediate_size=12, capacity_factor=0.8).train()
    moe.gate.e_score_correction_bias[-1] = -9.0  # one expert without a token
    draw = torch.Generator().manual_seed(0)
    x, pull = torch.randn(2, 7, WIDTH, generator=draw).requires_grad_(), torch.randn(2, 7, WIDTH, generator=draw)
    found = []
    for multiple in (1, 5):
        moe.row_multiple = multiple
        y, report = moe(x)
        found.append((y, *torch.autograd.grad(y, [x, *moe.parameters()], pull), report.counts, report.dropped))
    for plain, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), multiple=st.integers(1, 9), n_experts=st.integers(2, 6))
def test_every_assignment_has_a_row_of_its_expert(seed: int, multiple: int, n_experts: int) -> None:
    experts = torch.randint(n_experts, (11, 2), generator=torch.Generator().manual_seed(seed))
    path = route(experts, n_experts, multiple)
    counts = experts.flatten().bincount(minlength=n_experts).tolist()
    assert path.rows.tolist() == [-(-count // multiple) * multiple for count in counts]
    owners = torch.arange(n_experts).repeat_interleave(path.rows)
    assert torch.equal(owners[path.inverse], experts.flatten())
    assert torch.equal(path.order[path.inverse], torch.arange(22))
    weights = torch.rand(11, 2) + 1
    rows = sort_weights(weights, path)
    assert torch.equal(rows[path.inverse], weights.flatten())
    assert int((rows > 0).sum()) == 22  # what fills up weighs nothing


def test_an_expert_nobody_chose_gets_no_gradient_and_breaks_nothing() -> None:
    for implementation in ("eager", "grouped_mm"):
        moe = layer("batch_loss", experts_implementation=implementation, router_z_loss=0.0, balance={"kind": "none"})
        moe.gate.e_score_correction_bias[3] = -9.0
        y, report = moe(torch.randn(2, 7, WIDTH))
        y.square().sum().backward()
        assert int(report.counts[3]) == 0
        assert moe.experts.down_proj.grad is not None
        assert not moe.experts.down_proj.grad[3].any()
        assert moe.experts.down_proj.grad[report.counts > 0].flatten(1).any(1).all()


def test_same_bits_in_every_run() -> None:
    moe, x = layer("v3"), torch.randn(3, 50, WIDTH)

    def gradients() -> list[Tensor]:
        y, report = moe(x)
        return list(torch.autograd.grad((y * y).sum() + report.loss, list(moe.parameters())))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def fits_by_hand(experts: Tensor, capacity: int, real: Tensor) -> Tensor:
    taken: Counter[int] = Counter()
    out = torch.zeros_like(experts, dtype=torch.bool)
    for t in range(experts.shape[1]):
        for b in range(experts.shape[0]):
            for k in range(experts.shape[2]):
                expert = int(experts[b, t, k])
                if real[b, t] and taken[expert] < capacity:
                    out[b, t, k] = True
                    taken[expert] += 1
    return out


@settings(max_examples=40, deadline=None)
@given(capacity=st.integers(1, 12), padded=st.booleans(), seed=st.integers(0, 999))
def test_earlier_positions_come_first(capacity: int, padded: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    experts = torch.randint(5, (3, 7, 2), generator=draw)
    real = torch.rand(3, 7, generator=draw) < 0.7 if padded else torch.ones(3, 7, dtype=torch.bool)
    got = within_capacity(experts, capacity, 5, real if padded else None)
    assert torch.equal(got, fits_by_hand(experts, capacity, real))


def test_dropped_assignments_add_nothing_and_are_counted() -> None:
    moe = layer("seed", capacity_factor=0.6, n_shared_experts=1).train()
    x = torch.randn(3, 7, WIDTH)
    capacity = moe.config.capacity(21)
    assert capacity == math.ceil(0.6 * 21 * 2 / 6)
    choice = moe.gate(x.flatten(0, 1))
    fits = fits_by_hand(choice.experts.view(3, 7, 2), capacity, torch.ones(3, 7, dtype=torch.bool)).flatten(0, 1)
    y, report = moe(x)
    assert int(report.dropped) == int((~fits).sum()) > 0
    assert torch.equal(report.counts, choice.experts.flatten().bincount(minlength=6))  # before drops
    assert close(y, token_by_token(moe, x, fits))
    y, report = moe.eval()(x)
    assert int(report.dropped) == 0
    assert close(y, token_by_token(moe, x))


def test_dropping_does_not_leak_the_future() -> None:
    moe = layer("seed", capacity_factor=0.5).train()
    x = torch.randn(2, 9, WIDTH)
    changed = x.clone()
    changed[:, 5:] = torch.randn(2, 4, WIDTH)
    torch.testing.assert_close(moe(x)[0][:, :5], moe(changed)[0][:, :5])


def test_capacity_of_the_seed_is_every_token() -> None:
    config = MoEConfig(n_routed_experts=4, num_experts_per_tok=2, capacity_factor=2.0)
    assert [config.capacity(t) for t in (1, 7, 2048)] == [1, 7, 2048]
    assert MoEConfig(n_routed_experts=10, num_experts_per_tok=1, capacity_factor=1.1).capacity(100) == 11  # not 12
    assert MoEConfig().capacity(100) is None


@pytest.mark.parametrize("kind", MOE_KINDS)
def test_padding_is_neither_counted_nor_given_room(kind: str) -> None:
    moe = layer(kind).train()
    x, real = torch.randn(2, 7, WIDTH), torch.ones(2, 7, dtype=torch.bool)
    real[:, 4:] = False
    (y, report), (alone, short) = moe(x, real), moe(x[:, :4].contiguous())
    assert close(y[:, :4], alone)
    assert torch.equal(report.counts, short.counts)
    assert int(report.dropped) == int(short.dropped)
    torch.testing.assert_close(report.loss, short.loss)
    torch.testing.assert_close(report.entropy, short.entropy)


def test_losses_are_for_training() -> None:
    moe, x = layer("batch_loss"), torch.randn(2, 7, WIDTH)
    assert moe.train()(x)[1].loss > 0
    assert moe.eval()(x)[1].loss == 0
    assert int(moe(x)[1].counts.sum()) == 28


def test_layers_are_named_or_counted() -> None:
    assert [MoEConfig(layers=(2, 4, 6)).is_moe(i) for i in range(8)] == [
        False,
        False,
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    every_other = MoEConfig(first_k_dense_replace=2, moe_layer_freq=2)
    assert [i for i in range(8) if every_other.is_moe(i)] == [2, 4, 6]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_experts_per_tok": 5}, "more than the 4"),
        ({"n_routed_experts": 6, "n_group": 4}, "does not divide"),
        ({"n_routed_experts": 6, "n_group": 3, "topk_group": 4}, "more than the 3"),
        ({"n_routed_experts": 6, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 3}, "hold only 2"),
        (
            {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "topk_method": "greedy"},
            "group_limited_greedy or noaux_tc",
        ),
        ({"n_routed_experts": 6, "n_group": 6, "topk_group": 2}, "one expert each"),
        ({"layers": [1], "first_k_dense_replace": 1}, "one or the other"),
        ({"layers": [2, 1]}, "rising order"),
        ({"layers": [-1, 1]}, "rising order"),
        ({"balance": {"kind": "sinkhorn"}}, "loss_free"),
    ],
)
def test_impossible_mixtures_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate(keys)
