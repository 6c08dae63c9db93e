from __future__ import annotations

import math

import pytest
import torch
from tiny_models import batch_of, tiny_model
from torch.utils.checkpoint import checkpoint

from fathom.model.loss import language_model_loss
from fathom.model.moe.balance import LossFree, balance_loss, max_vio, update_bias, z_loss
from fathom.model.moe.router import Router

COUNTS = torch.tensor([8, 2, 2, 0])


def test_bias_moves_by_the_sign_of_the_violation() -> None:
    bias = torch.tensor([0.5, 0.0, 0.0, -0.25])
    update_bias("sign", bias, torch.tensor([8, 3, 1, 0]), 0.125)
    assert bias.tolist() == [0.375, 0.0, 0.125, -0.125]


def test_bias_moves_by_the_share_of_the_violation() -> None:
    bias = torch.zeros(4)
    update_bias("proportional", bias, COUNTS, 0.1)
    torch.testing.assert_close(bias, 0.1 * torch.tensor([-5.0, 1.0, 1.0, 3.0]) / 3)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_nothing_moves_without_load_or_rate(rule: str) -> None:
    bias = torch.ones(4)
    update_bias(rule, bias, torch.zeros(4, dtype=torch.long), 0.1)
    update_bias(rule, bias, COUNTS, 0.0)
    assert bias.tolist() == [1.0] * 4


def test_rate_ends_at_zero() -> None:
    balance = LossFree(rate=0.01, decay_from=0.8)
    assert [balance.rate_at(p) for p in (0.0, 0.5, 0.8)] == [0.01] * 3
    assert balance.rate_at(0.9) == pytest.approx(0.005)
    assert balance.rate_at(1.0) == 0.0
    assert LossFree(rate=0.01, decay_from=1.0).rate_at(1.0) == 0.01


def test_max_vio() -> None:
    assert max_vio(COUNTS) == pytest.approx((8 - 3) / 3)
    assert max_vio(torch.full((5,), 7)) == 0.0
    assert max_vio(torch.zeros(5)) == 0.0


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_a_lopsided_router_comes_into_balance(rule: str) -> None:
    draw = torch.Generator().manual_seed(0)
    gate = Router(
        8, 8, 2, scoring_func="sigmoid", norm_topk_prob=True, scale=1.0, n_group=1, topk_group=1, group_score="max"
    )
    gate.weight.data.normal_(0, 0.3, generator=draw)
    offset = torch.randn(8, generator=draw)

    def load(tokens: int) -> torch.Tensor:
        return gate(torch.randn(tokens, 8, generator=draw) + offset).experts.flatten().bincount(minlength=8)

    before = max_vio(load(4000))
    for step in range(300):
        update_bias(rule, gate.e_score_correction_bias, load(400), 0.01 * min(1.0, 2 - step / 150))
    assert before > 1
    assert max_vio(load(4000)) < 0.15


@pytest.mark.parametrize("per_sequence", [True, False])
def test_balance_loss_is_the_sum(per_sequence: bool) -> None:
    scores = torch.rand(3, 7, 5, dtype=torch.float64)
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, 4:] = False
    parts = [[(b, t) for t in range(7) if real[b, t]] for b in range(3)]
    stretches = parts if per_sequence else [[pair for part in parts for pair in part]]
    want = 0.0
    for stretch in stretches:
        rows = torch.stack([scores[b, t] for b, t in stretch])
        likes = (rows / rows.sum(-1, keepdim=True)).mean(0)
        chosen = rows.topk(2).indices.flatten().bincount(minlength=5)
        want += float((5 / (2 * len(stretch)) * chosen * likes).sum()) / len(stretches)
    assert float(balance_loss(scores, 2, real, per_sequence)) == pytest.approx(want)


def test_balance_loss_of_equal_experts_is_one() -> None:
    scores = torch.eye(4)[torch.arange(8) % 4][None] + 1e-9
    assert float(balance_loss(scores, 1, None, True)) == pytest.approx(1.0, abs=1e-6)
    assert float(balance_loss(torch.eye(4)[[0] * 8][None], 1, None, True)) == pytest.approx(4.0)


def test_z_loss() -> None:
    logits = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    want = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert float(z_loss(logits, None)) == pytest.approx(want)
    assert float(z_loss(logits, torch.tensor([[True, False]]))) == pytest.approx(math.log(2) ** 2)


def test_only_loss_free_layers_are_stepped() -> None:
    for moe, moves in (("v3", True), ("v2", False), ("eager", False)):
        model = tiny_model(moe=moe)
        counts = {number: torch.arange(6) for number in model.moe_layers()}
        model.balance_step(counts, progress=0.0)
        for layer in model.moe_layers().values():
            assert bool(layer.gate.e_score_correction_bias.any()) is moves
    model = tiny_model(moe="v3")
    assert set(model.moe_layers()) == {1, 2}  # layer 0 is dense, 2 is the MTP depth
    model.balance_step({1: torch.arange(6), 2: torch.arange(6)}, progress=1.0)
    assert not any(layer.gate.e_score_correction_bias.any() for layer in model.moe_layers().values())


def test_recomputation_counts_once_and_changes_nothing() -> None:
    model, batch = tiny_model(moe="v3"), batch_of()
    plain = language_model_loss(model, batch)
    plain.total.backward()
    want = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    model.run_block = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    again = language_model_loss(model, batch)
    again.total.backward()
    for a, b in zip(plain.routing, again.routing, strict=True):
        assert a.layer == b.layer
        assert torch.equal(a.counts, b.counts)
    assert all(torch.equal(w.grad, want[name]) for name, w in model.named_parameters() if w.grad is not None)
