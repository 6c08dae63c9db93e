"""The whole recipe gives the losses it gave: data, model, MTP, balance, optimizer and schedule together.

Kernels of other processors sum in another order, so a number may move in its last digits; a change of the recipe moves
it by far more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_run import STEPS, rows, written

TOLERANCE = {"grad_norm": 2e-2}


def test_golden_losses(tmp_path: Path) -> None:
    found, golden = rows(tmp_path / "run"), written()
    assert len(found) == len(golden) == STEPS
    for new, old in zip(found, golden, strict=True):
        assert (new["step"], new["tokens"]) == (old["step"], old["tokens"])
        for name in new.keys() - {"step", "tokens"}:
            if old[name]:
                close = pytest.approx(float(old[name]), rel=TOLERANCE.get(name, 2e-3))
                assert float(new[name]) == close, f"step {old['step']}: {name}"
            else:
                assert new[name] == ""
