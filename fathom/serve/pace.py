"""Whether drafting pays, by measuring: tokens a second with it and without it, by the number of rows.

Speculation changes no text, so a step may draft or not as it likes. For each size of batch both ways are tried for
some steps, and the faster one is used; the other is tried again now and then, since lengths and texts change. When
drafting loses everywhere it was tried, new sequences do without it for a while, and save the depths' part of reading
their prompts too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIAL = 8  # steps of a trial, and how many of the newest count
AGAIN = 256  # steps after which the loser is tried again
REST = 2048  # steps without new drafting sequences after it lost everywhere


@dataclass
class _Rates:
    """Of one size of batch: seconds a token of the newest steps, plain and drafting."""

    spent: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    tokens: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    steps: int = 0
    trial: int = 0

    def add(self, drafting: bool, tokens: int, seconds: float) -> None:
        """A step was made."""
        self.steps += 1
        for kept, value in ((self.spent[drafting], seconds), (self.tokens[drafting], tokens)):
            kept.append(value)  # type: ignore[arg-type]
            del kept[: -4 * TRIAL]

    def rate(self, drafting: bool) -> float | None:
        """Tokens a second; None before TRIAL steps."""
        seconds, tokens = self.spent[drafting], self.tokens[drafting]
        return None if len(seconds) < TRIAL else sum(tokens) / max(sum(seconds), 1e-9)

    @property
    def wins(self) -> bool | None:
        """Whether drafting is faster; None: not known yet."""
        plain, drafting = self.rate(False), self.rate(True)
        return None if plain is None or drafting is None else drafting > plain


class Pace:
    """mode: on (always draft), off (never), auto (what is faster)."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.steps, self.wake = 0, 0
        self.rates: dict[int, _Rates] = {}

    def admits(self) -> bool:
        """Whether a new sequence should be able to draft."""
        return self.mode == "on" or (self.mode == "auto" and not self.wake)

    def drafts(self, rows: int) -> bool:
        """Whether the next step over so many rows should."""
        if self.mode != "auto":
            return self.mode == "on"
        found = self.rates.setdefault(_size(rows), _Rates())
        if found.rate(True) is None:
            return True
        if found.rate(False) is None:
            return False
        if found.trial:
            found.trial -= 1
            return not found.wins
        if found.steps >= AGAIN:
            found.steps, found.trial = 0, TRIAL
        return bool(found.wins)

    def observe(self, rows: int, drafting: bool, tokens: int, seconds: float) -> None:
        """A step over so many rows gave so many tokens in so many seconds."""
        self.steps += 1
        if self.wake and self.steps >= self.wake:  # a fresh start
            self.wake = 0
            self.rates.clear()
        self.rates.setdefault(_size(rows), _Rates()).add(drafting, tokens, seconds)
        known = [rates.wins for rates in self.rates.values() if rates.wins is not None]
        if self.mode == "auto" and not self.wake and known and not any(known):
            self.wake = self.steps + REST

    @property
    def winning(self) -> bool:
        """Whether drafting is in use, as far as is known."""
        known = [rates.wins for rates in self.rates.values() if rates.wins is not None]
        return self.mode == "on" or (self.mode == "auto" and not self.wake and (not known or any(known)))


def _size(rows: int) -> int:
    """1, 2, 4, 8, ...: sizes of batch that are measured together."""
    return 1 << (rows - 1).bit_length()
