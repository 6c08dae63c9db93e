"""The models of the benches are those that they are said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.cli.plan import facts
from fathom.model.attention.mla import MLAConfig
from fathom.recipe import RunConfig, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def config(name: str) -> tuple[RunConfig, MLAConfig]:
    run = load_config(CONFIGS / f"{name}.yaml")
    assert isinstance(run.model.attention, MLAConfig)
    return run, run.model.attention


def test_129m() -> None:
    run, _ = config("bench-129m")
    told = facts(run)
    assert told["parameters"] == 129_476_608
    assert told["mtp_parameters"] == 0
    assert told["tokens_per_step"] == 2048
    assert run.model.tie_word_embeddings


def test_33m_has_v3s_heads() -> None:
    run, mine = config("bench-33m")
    _, v3 = config("v3")
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert getattr(mine, name) == getattr(v3, name)
    assert facts(run)["parameters"] == pytest.approx(33e6, rel=0.03)


def test_mtp_has_one_depth_over_many_layers() -> None:
    run, _ = config("bench-mtp")
    assert run.model.mtp.num_nextn_predict_layers == 1
    assert run.model.num_hidden_layers >= 8
    assert facts(run)["vocab_size"] < 1000
