from __future__ import annotations

import hmac

import pytest

from fathom.serve import limits
from fathom.serve.limits import Keys, Rates


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(["one", "two", "two"])
    assert [keys.known(key) for key in (b"one", b"two", b"", b"three", b"\xff\x00")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not len(Keys())
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    assert keys.known(b"one")
    assert compared == [(32, 32)] * 2, "all keys are compared, hit or not"


class Clock:
    time = 100.0

    def __call__(self) -> float:
        return self.time


def test_requests_a_minute() -> None:
    clock = Clock()
    rates = Rates(requests=3, clock=clock)
    left = [rates.enter("a").headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    refused = rates.enter("a")
    assert (refused.wait, refused.what) == (20.0, "requests")
    assert not rates.enter("b").wait, "another caller has a bucket of its own"
    clock.time += 19.9
    assert rates.enter("a").wait == pytest.approx(0.1)
    clock.time += 0.1
    entered = rates.enter("a")
    assert not entered.wait
    assert entered.headers["x-ratelimit-limit-requests"] == "3"
    assert entered.headers["x-ratelimit-reset-requests"] == "60.000s"


def test_tokens_a_minute_may_become_a_debt() -> None:
    clock = Clock()
    rates = Rates(tokens=60, clock=clock)
    assert not rates.enter("a").wait
    rates.spend("a", 100)
    assert rates.enter("a").headers["x-ratelimit-remaining-tokens"] == "0"
    refused = rates.enter("a")
    assert (refused.wait, refused.what) == (41.0, "tokens")
    clock.time += 41.0
    assert not rates.enter("a").wait
    clock.time += 1000
    assert rates.enter("a").headers["x-ratelimit-remaining-tokens"] == "60", "it never holds more than a minute's worth"


def test_no_limits() -> None:
    rates = Rates()
    assert not rates
    rates.spend("a", 10**9)
    assert rates.enter("a") == limits.Standing({})


def test_callers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REMEMBERED", 2)
    rates = Rates(requests=1, clock=Clock())
    for caller in "abac":
        rates.enter(caller)
    assert rates.enter("a").wait, "a was seen lately"
    assert not rates.enter("b").wait
