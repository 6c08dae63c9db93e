"""Who may ask, and how much: API keys, and requests and tokens a minute for each of them."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

REMEMBERED = 10_000  # so many callers' buckets are kept; the longest unseen are forgotten, which are the fullest


def digest(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def short(key: bytes) -> str:
    """A key as the log names it."""
    return digest(key).hex()[:8]


class Keys:
    """The keys that open the server; none: it is open."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple({digest(key.encode()): None for key in keys})

    def __len__(self) -> int:
        return len(self._digests)

    def known(self, key: bytes) -> bool:
        """Whether it is one of them. All are compared, each in constant time, so that the time tells nothing."""
        given, found = digest(key), False
        for each in self._digests:
            found |= hmac.compare_digest(given, each)
        return found


@dataclass
class Bucket:
    """A token bucket: `rate` a minute flow in up to `rate`; what is taken may make it a debt, which is paid first."""

    rate: float
    level: float
    seen: float

    def now(self, time: float) -> float:
        """The level at a time."""
        self.level = min(self.rate, self.level + (time - self.seen) * self.rate / 60)
        self.seen = time
        return self.level

    def until(self, level: float) -> float:
        """Seconds until it stands at a level."""
        return max(0.0, (level - self.level) * 60 / self.rate)


@dataclass(frozen=True)
class Standing:
    """What a caller has left, as headers tell it. wait: seconds until the next request has a chance; 0: now."""

    headers: dict[str, str]
    wait: float = 0.0
    what: str = ""


class Rates:
    """Requests and tokens a minute, for each caller by itself; None: as many as they like.

    Tokens are paid after the fact: a request is let in while the bucket is not empty, its prompt is taken at once and
    its answer when it has ended, which may leave a debt. So a long request needs no guess, and the mean rate holds.
    """

    def __init__(
        self, requests: int | None = None, tokens: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.requests, self.tokens, self._clock = requests, tokens, clock
        self._callers: OrderedDict[str, tuple[Bucket | None, Bucket | None]] = OrderedDict()

    def __bool__(self) -> bool:
        return self.requests is not None or self.tokens is not None

    def enter(self, caller: str) -> Standing:
        """Count a request. A standing with a wait: it is refused, and nothing was taken."""
        requests, tokens = self._of(caller)
        now, wait, what = self._clock(), 0.0, ""
        if requests is not None and requests.now(now) < 1:
            wait, what = requests.until(1), "requests"
        if tokens is not None and tokens.now(now) <= 0 and tokens.until(1) > wait:
            wait, what = tokens.until(1), "tokens"
        if requests is not None and not wait:
            requests.level -= 1
        return Standing(self._headers(requests, tokens), wait, what)

    def spend(self, caller: str, tokens: int) -> None:
        """Take tokens."""
        bucket = self._of(caller)[1]
        if bucket is not None:
            bucket.now(self._clock())
            bucket.level -= tokens

    def _of(self, caller: str) -> tuple[Bucket | None, Bucket | None]:
        found = self._callers.get(caller)
        if found is None:
            now = self._clock()
            new = [None if rate is None else Bucket(rate, rate, now) for rate in (self.requests, self.tokens)]
            found = self._callers[caller] = (new[0], new[1])
            if len(self._callers) > REMEMBERED:
                self._callers.popitem(last=False)
        self._callers.move_to_end(caller)
        return found

    def _headers(self, requests: Bucket | None, tokens: Bucket | None) -> dict[str, str]:
        headers = {}
        for name, bucket in (("requests", requests), ("tokens", tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(int(bucket.rate))
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
                headers[f"x-ratelimit-reset-{name}"] = f"{bucket.until(bucket.rate):.3f}s"
        return headers
