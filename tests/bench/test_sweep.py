"""Sweeps: the points of a curve, and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fathom.bench import sweep
from fathom.bench.decode import DecodeBench
from fathom.bench.machine import Surroundings
from fathom.bench.material import Material
from fathom.errors import ConfigError

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def row(batch: int, context: int) -> dict[str, Any]:
    speed = {"median": 200.0, "low": 1.0, "high": 1.0, "least": 1.0, "most": 1.0, "n": 1}
    return {"contestant": "fathom", "arithmetic": "float32", "batch": batch, "context": context,
            "decode_tokens_per_second": speed, "prefill_tokens_per_second": {**speed, "median": 4000.0}}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, DecodeBench]]:
    """What the bench was asked for; it gives a row a cell without measuring."""
    seen: list[tuple[Any, DecodeBench]] = []

    def bench(material: Material, peers: Any, left_out: Any, around: Any, plan: DecodeBench) -> dict[str, Any]:
        moe = material.run.model.moe
        seen.append((None if moe is None else moe.n_routed_experts, plan))
        return {"rows": [row(*cell) for cell in plan.cells], "ratios": [], "agreement": [], "contestants": [],
                "left_out": {}}  # fmt: skip

    monkeypatch.setattr(sweep, "bench", bench)
    return seen


def swept(name: str, folder: Path, *overrides: str) -> dict[str, Any]:
    material = Material.of(TINY, overrides, folder)
    return sweep.swept(name, material, [], {}, Surroundings(threads=1), DecodeBench(new=8))


def test_over_context(asked: Any, tmp_path: Path) -> None:
    found = swept("context", tmp_path)
    assert [p["value"] for p in found["points"]] == [16, 32, 64]  # the window holds 128
    assert asked[0][1].batches == (1,)


def test_over_rows_a_step_is_one_for_all(asked: Any, tmp_path: Path) -> None:
    found = swept("batch", tmp_path)
    assert [p["value"] for p in found["points"]] == [1, 2, 4, 8, 16, 32]
    assert [p["step_ms"] for p in found["points"]] == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0]
    assert {p["read_ms"] for p in found["points"]} == {0.25}


def test_over_experts_active_parameters_stay(asked: Any, tmp_path: Path) -> None:
    found = swept("experts", tmp_path)
    assert [p["value"] for p in found["points"]] == [4, 8, 16, 32, 64] == [count for count, _ in asked]
    assert list(tmp_path.iterdir()) == []  # models are gone
    with pytest.raises(ConfigError, match="has no experts"):
        swept("experts", tmp_path, "model.moe=null")


def test_the_picture(asked: Any, tmp_path: Path) -> None:
    found = swept("context", tmp_path)
    place = sweep.draw(found, tmp_path / "new" / "folder")
    assert place.name == "decode-context.svg"
    text = place.read_text()
    assert "fathom float32" in text
    assert "tokens of the prompt" in text
    assert sweep.draw(found, tmp_path / "again").read_text() == text
