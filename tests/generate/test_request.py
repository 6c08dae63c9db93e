from __future__ import annotations

import math
from typing import Any

import pytest

from fathom.errors import RequestError
from fathom.generate.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.inf),
        ("seed", 1.5),
        ("stop", [""]),
        ("stop", [3]),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("logit_bias", {3: 101}),
        ("logit_bias", {"3": 1}),
        ("logit_bias", [3]),
        ("logprobs", -1),
        ("ignore_eos", 1),
    ],
)
def test_impossible_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*possible"):
        SamplingParams.of({name: value})


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature=-1, top_k=0)
    assert "temperature is -1" in str(caught.value)
    assert "top_k is 0" in str(caught.value)


def test_unknown_options_are_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="'temprature'; did you mean temperature"):
        SamplingParams.of({"temprature": 1})
    with pytest.raises(RequestError, match="possible are max_tokens"):
        SamplingParams.of({"xyz": 1})


def test_every_possible_edge_is_taken() -> None:
    params = SamplingParams(
        max_tokens=None, temperature=0, top_k=1, top_p=1, min_p=1, stop="one", seed=0, logprobs=0, stop_token_ids=[2]
    )  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids, params.greedy) == (("one",), (2,), True)
    assert SamplingParams(temperature=1e-6).greedy  # as in vLLM
    assert not SamplingParams(temperature=1e-4).greedy


def test_what_is_given_is_copied() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0}


def test_min_tokens_must_fit() -> None:
    with pytest.raises(RequestError, match="min_tokens is 9, more than max_tokens 5"):
        SamplingParams(min_tokens=9, max_tokens=5)
    assert SamplingParams(min_tokens=9, max_tokens=None).min_tokens == 9


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(()), "no tokens"),
        (Request((1,) * 7), "7 tokens.*window holds 7.*at most 6"),
        (Request((1, 29)), "The prompt has the token 29.*0 to 28"),
        (Request((-1,)), "token -1"),
        (Request((1,), SamplingParams(stop_token_ids=(30,))), "stop_token_ids has the token 30"),
        (Request((1,), SamplingParams(logit_bias={29: 1.0})), "logit_bias has the token 29"),
    ],
)
def test_a_request_is_checked_against_the_model(request_: Request, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        request_.check(29, 7)


def test_a_request_that_fits() -> None:
    Request((0, 28, 1, 2, 3, 4), SamplingParams(stop_token_ids=(28,), logit_bias={0: -100})).check(29, 7)
