from __future__ import annotations

import pytest

from fathom.serve.pace import AGAIN, REST, TRIAL, Pace


def steps(pace: Pace, count: int, plain: float, drafting: float, rows: int = 4) -> list[bool]:
    """Make steps whose speeds (tokens a second) are given; whether each drafted."""
    made = []
    for _ in range(count):
        draft = pace.drafts(rows)
        pace.observe(rows, draft, rows, rows / (drafting if draft else plain))
        made.append(draft)
    return made


@pytest.mark.parametrize(("plain", "drafting"), [(100.0, 140.0), (100.0, 70.0)])
def test_the_faster_way_is_used_after_both_were_tried(plain: float, drafting: float) -> None:
    made = steps(Pace("auto"), 10 * AGAIN, plain, drafting)
    assert made[: 2 * TRIAL] == [True] * TRIAL + [False] * TRIAL
    share = sum(made) / len(made)
    assert (share > 0.95) if drafting > plain else (share < 0.05)
    assert 0 < sum(made[2 * TRIAL :]) < len(made) - 2 * TRIAL  # the loser is tried again


def test_a_change_of_speed_is_seen() -> None:
    pace = Pace("auto")
    steps(pace, 3 * AGAIN, 100, 70)
    made = steps(pace, 12 * AGAIN, 100, 150)
    assert sum(made[-AGAIN:]) > 0.9 * AGAIN


def test_sizes_of_batch_are_measured_apart() -> None:
    pace = Pace("auto")
    steps(pace, 3 * AGAIN, 100, 150, rows=1)
    steps(pace, 3 * AGAIN, 100, 50, rows=16)
    assert sum(pace.drafts(1) for _ in range(20)) > 10 > sum(pace.drafts(16) for _ in range(20))
    assert pace.winning
    assert pace.admits()


def test_it_rests_when_it_loses_everywhere_and_wakes() -> None:
    pace = Pace("auto")
    assert pace.admits()
    steps(pace, 3 * TRIAL, 100, 50)
    assert not pace.admits()
    assert not pace.winning
    awake = 0
    for _ in range(REST + 10):
        steps(pace, 1, 100, 50)
        awake += pace.admits()
    assert awake > 0


@pytest.mark.parametrize(("mode", "way"), [("on", True), ("off", False)])
def test_what_was_said_holds(mode: str, way: bool) -> None:
    pace = Pace(mode)
    assert steps(pace, 2 * AGAIN, 100, 50 if way else 200) == [way] * (2 * AGAIN)
    assert (pace.admits(), pace.winning) == (way, way)
