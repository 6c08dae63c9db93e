"""Whether the API is there, and what it serves. One look serves every open page."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Literal

from fathom.client.http import Api, ApiError, Away, Busy, KeyRefused
from fathom.client.wire import Model

State = Literal["unknown", "ready", "waiting", "away", "key", "failed"]
FRESH = 3.0  # seconds that a look holds for


@dataclass(frozen=True)
class Status:
    """What a look found.

    state    unknown (nobody looked yet), ready, waiting (its model does not answer yet), away, key (refused), failed
    reason   in words, unless it is ready
    model    the one that is served, if it could be asked
    """

    state: State = "unknown"
    reason: str = ""
    model: Model | None = None


async def look(api: Api) -> Status:
    """Ask the API what it serves and whether that answers. Nothing is raised: a page always has something to show."""
    try:
        models = await api.models()
        if not models:
            return Status("waiting", "it serves no model yet")
        reason = await api.waiting()
    except ApiError as error:
        return Status(_state(error), str(error))
    return Status("ready" if reason is None else "waiting", reason or "", models[0])


def _state(error: ApiError) -> State:
    kinds: tuple[tuple[type[ApiError], State], ...] = ((Away, "away"), (KeyRefused, "key"), (Busy, "waiting"))
    return next((state for kind, state in kinds if isinstance(error, kind)), "failed")


class Watch:
    """The latest look, shared: a hundred open pages ask the API no more often than one."""

    def __init__(self, api: Api, fresh: float = FRESH) -> None:
        self.api, self.fresh = api, fresh
        self._status, self._at = Status(), -fresh
        self._lock = asyncio.Lock()

    async def status(self, now: bool = False) -> Status:
        """What the last look found, or another one's if that is too long ago. now: look in any case."""
        asked = time.monotonic()
        async with self._lock:
            if self._at + (0 if now else self.fresh) < asked:  # else somebody looked while this one waited
                self._status = await look(self.api)
                self._at = time.monotonic()
            return self._status
