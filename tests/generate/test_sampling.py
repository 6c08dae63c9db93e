from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.generate.request import SamplingParams
from fathom.generate.sampling import Turn, adjust, choose, choose_batch, distribution, draw, uniform

V = 31


def turn(
    params: SamplingParams, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2, 2), seed: int = 0
) -> Turn:
    return Turn(params, seed, prompt, output, frozenset({5, 6}))


def logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def probabilities(z: Tensor, **options: Any) -> Tensor:
    w = distribution(z, SamplingParams(**options))
    return w / w.sum()


# --- adjusting


def test_penalties_are_the_equations() -> None:
    z = torch.tensor([2.0, -2.0, 1.0, -1.0, 0.5])
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    got = adjust(z, Turn(params, 0, (0, 1), (2, 3, 3), frozenset()))
    want = [2 / 2, -2 * 2, 1 / 2 - 0.25 - 0.5, -1 * 2 - 2 * 0.25 - 0.5, 0.5]
    assert got.tolist() == pytest.approx(want)
    assert z.tolist() == [2.0, -2.0, 1.0, -1.0, 0.5]  # what the model gave stays


def test_presence_and_frequency_look_at_the_output_only() -> None:
    z = logits()[0]
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=1.0)
    assert torch.equal(adjust(z, turn(params)), z)
    assert (adjust(z, turn(params, output=(2,))) != z).nonzero().tolist() == [[2]]


def test_bias_and_barred_ends() -> None:
    z = logits()[0]
    params = SamplingParams(logit_bias={3: 100.0, 4: -100.0}, min_tokens=2)
    got = adjust(z, turn(params, output=(9,)))
    assert got[3] - z[3] == pytest.approx(100)
    assert got[4] - z[4] == pytest.approx(-100)
    assert got[[5, 6]].tolist() == [-math.inf, -math.inf]
    assert torch.equal(adjust(z, turn(params, output=(9, 9)))[[5, 6]], z[[5, 6]])


def test_logits_of_half_precision_are_widened() -> None:
    assert adjust(logits()[0].bfloat16(), turn(SamplingParams())).dtype == torch.float32


# --- the distribution


def test_temperature() -> None:
    z = logits()[0]
    torch.testing.assert_close(probabilities(z, temperature=0.5), (z.double() * 2).softmax(-1))


def test_top_k_keeps_the_largest_and_their_ties() -> None:
    z = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert probabilities(z, top_k=1).nonzero().flatten().tolist() == [1]
    assert probabilities(z, top_k=2).nonzero().flatten().tolist() == [1, 2, 3]
    assert torch.equal(probabilities(z, top_k=99), probabilities(z))


@pytest.mark.parametrize(("p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.96, 4), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(p: float, kept: int) -> None:
    z = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64).log()
    got = distribution(z, SamplingParams(top_p=p))
    assert int((got > 0).sum()) in ({kept} if p not in (0.5, 0.8) else {kept, kept + 1})  # sums are rounded


def test_top_p_follows_top_k_and_min_p_follows_both() -> None:
    z = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    # of the first two, the first has 0.4 / 0.7 = 0.57
    assert probabilities(z, top_k=2, top_p=0.55).nonzero().flatten().tolist() == [0]
    assert probabilities(z, top_k=2, top_p=0.6).nonzero().flatten().tolist() == [0, 1]
    assert probabilities(z, min_p=0.51).nonzero().flatten().tolist() == [0, 1]
    assert probabilities(z, min_p=1.0).nonzero().flatten().tolist() == [0]


def test_what_is_kept_keeps_its_ratios() -> None:
    z = logits()[0] / 3
    got, all_ = probabilities(z, top_k=7, top_p=0.7, min_p=0.01), z.double().softmax(-1)
    kept = got > 0
    assert 1 < int(kept.sum()) < 7
    torch.testing.assert_close(got[kept], all_[kept] / all_[kept].sum())


# --- drawing


def test_a_draw_is_the_inverse_of_the_distribution_function() -> None:
    w = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    got = [draw(w * 3, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)]
    assert got == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_p": 0.5}])
def test_a_broken_model_gives_tokens_all_the_same(options: dict[str, Any]) -> None:
    rows, turns = torch.full((2, V), math.nan), [turn(SamplingParams.of(options))] * 2
    for choice in (*choose_batch(rows, turns), choose(rows[0], turns[0])):
        assert 0 <= choice.token < V


def test_frequencies_are_the_probabilities() -> None:
    z = torch.tensor([1.0, 0.0, 2.0, -1.0])
    params, n = SamplingParams(temperature=0.7), 4000
    counts = [0] * 4
    for seed in range(n):
        counts[choose(z, turn(params, seed=seed, prompt=())).token] += 1
    for count, p in zip(counts, probabilities(z, temperature=0.7).tolist(), strict=True):
        assert abs(count - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_chance_belongs_to_seed_and_place() -> None:
    params = SamplingParams()
    z = torch.zeros(V)
    tokens = [choose(z, turn(params, output=(0,) * n, seed=1)).token for n in range(9)]
    assert tokens == [choose(z, turn(params, output=(3,) * n, seed=1)).token for n in range(9)]
    assert tokens != [choose(z, turn(params, output=(0,) * n, seed=2)).token for n in range(9)]
    assert len(set(tokens)) > 2
    before = torch.get_rng_state()
    uniform(1, "sampling", 0)
    assert torch.equal(before, torch.get_rng_state())


def test_greedy_takes_no_chance() -> None:
    z = logits()[0]
    for options in ({}, {"top_k": 3, "top_p": 0.1, "min_p": 0.5}):
        assert choose(z, turn(SamplingParams(temperature=0, **options))).token == int(z.argmax())  # type: ignore[arg-type]


def test_logprobs_are_the_models_own() -> None:
    z = logits()[0]
    params = SamplingParams(temperature=0, logprobs=3, logit_bias={4: 100.0})
    choice = choose(z, turn(params))
    known = z.log_softmax(-1)
    assert choice.token == 4
    assert choice.logprob == pytest.approx(float(known[4]))
    best = known.topk(3)
    assert [t for t, _ in choice.top_logprobs] == best.indices.tolist()
    assert [p for _, p in choice.top_logprobs] == pytest.approx(best.values.tolist())
    assert choose(z, turn(SamplingParams())).logprob is None
    assert choose(z, turn(SamplingParams(logprobs=0))).top_logprobs == ()
    assert len(choose(z, turn(SamplingParams(logprobs=99))).top_logprobs) == V


# --- the batch against the rows


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 4, 13, 99]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([{}, {7: 3.0}]),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 2]),
)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.tuples(PARAMS, st.lists(st.integers(0, V - 1), max_size=4), st.integers(0, 99)), min_size=1, max_size=5), tied=st.booleans())  # fmt: skip # noqa: E501
def test_the_batch_is_its_rows(rows: list[tuple[SamplingParams, list[int], int]], tied: bool) -> None:
    z = logits(len(rows), seed=len(rows))
    z = z.round() if tied else z
    turns = [turn(params, tuple(output), seed=seed) for params, output, seed in rows]
    assert choose_batch(z, turns) == [choose(row, t) for row, t in zip(z, turns, strict=True)]


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_top_p_over_a_large_vocabulary_is_that_of_one_row(spread: float) -> None:
    """Flat rows need more of the likeliest tokens than the first look takes, peaked ones fewer."""
    z = torch.randn(6, 709, generator=torch.Generator().manual_seed(2)) * spread
    turns = [turn(SamplingParams(top_p=p), (), seed=i) for i, p in enumerate([0.5, 0.999, 1.0, 0.05, 0.9, 0.95])]
    assert choose_batch(z, turns) == [choose(row, t) for row, t in zip(z, turns, strict=True)]
    assert choose_batch(z[3:4], turns[3:4]) == [choose(z[3], turns[3])]
