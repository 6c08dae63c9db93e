from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.model.moe.router import Router, choose


def best_of(scores: list[float], k: int, groups: int, kept: int, rule: str) -> set[int]:
    """The rule in plain Python."""
    size = len(scores) // groups
    strength = []
    for group in range(groups):
        own = sorted(scores[group * size : (group + 1) * size], reverse=True)
        strength.append((own[0] if rule == "max" else sum(own[:2]), group))
    allowed = {group for _, group in sorted(strength, reverse=True)[:kept]}
    ranked = sorted(((s, i) for i, s in enumerate(scores) if i // size in allowed), reverse=True)
    return {i for _, i in ranked[:k]}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (3, 1), (3, 2), (3, 3)]),
    rule=st.sampled_from(["max", "top2"]),
    k=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_choice_is_the_rule(shape: tuple[int, int], rule: str, k: int, seed: int) -> None:
    groups, kept = shape
    scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))  # below 0 too, as s + b may be
    chosen = choose(scores, k, groups, kept, rule)
    for row, picked in zip(scores.tolist(), chosen.tolist(), strict=True):
        assert set(picked) == best_of(row, k, groups, kept, rule)


def router(**changes: object) -> Router:
    keys = {
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "scale": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "group_score": "top2",
    }
    made = Router(7, 6, 3, **{**keys, **changes})  # type: ignore[arg-type]
    made.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalised", [False, True])
def test_weights_are_those_of_the_scores(scoring: str, normalised: bool) -> None:
    gate = router(scoring_func=scoring, norm_topk_prob=normalised)
    x = torch.randn(11, 7)
    choice = gate(x)
    logits = x @ gate.weight.T
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    want = scores.gather(1, choice.experts)
    if normalised:
        want = want / want.sum(-1, keepdim=True)
    torch.testing.assert_close(choice.weights, 2.5 * want)
    torch.testing.assert_close(choice.scores, scores)
    assert torch.equal(choice.experts.sort(-1).values, scores.topk(3).indices.sort(-1).values)


def test_bias_chooses_and_never_weights() -> None:
    gate = router()
    x = torch.randn(11, 7)
    gate.e_score_correction_bias[4] = 10.0
    choice = gate(x)
    assert (choice.experts == 4).any(-1).all()
    scores = (x @ gate.weight.T).sigmoid().gather(1, choice.experts)
    torch.testing.assert_close(choice.weights, 2.5 * scores / scores.sum(-1, keepdim=True))
    assert "e_score_correction_bias" not in dict(gate.named_parameters())


def test_a_group_is_scored_with_the_bias() -> None:
    gate = router(n_group=3, topk_group=2)
    gate.e_score_correction_bias[2:4] = -10.0
    assert not torch.isin(gate(torch.randn(11, 7)).experts, torch.tensor([2, 3])).any()


def test_autocast_does_not_touch_it() -> None:
    gate, x = router(), torch.randn(11, 7)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gate(x)
    for a, b in zip(inside, gate(x), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_bias_stays_float32_to_the_bit() -> None:
    gate = router()
    gate.e_score_correction_bias.fill_(math.pi)
    gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.e_score_correction_bias, torch.full((6,), math.pi))
    assert gate.to("meta").e_score_correction_bias.device.type == "meta"


def test_ties_fall_alike_every_time() -> None:
    gate = router()
    gate.weight.data.zero_()
    x = torch.randn(50, 7)
    assert torch.equal(gate(x).experts, gate(x).experts)
    assert (gate(x).experts == gate(x[:1]).experts).all()
