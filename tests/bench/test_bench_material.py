"""What contestants are given: the same model in every format, the same rows, prompts that never come twice."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

from disk_run import disk_run

from fathom.bench.material import Material
from fathom.errors import ConfigError
from fathom.hub.huggingface import pretrained
from fathom.load import load
from fathom.pretrain import build_model
from fathom.recipe import load_config
from fathom.runtime.device import Device

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material.of(TINY, ["model.mtp.num_nextn_predict_layers=0"], tmp_path_factory.mktemp("scratch"))


def test_every_format_is_the_same_model(material: Material) -> None:
    tokens = torch.tensor([[5, 3, 2, 7, 11]])
    with torch.no_grad():
        ours = material.model(tokens)
        assert torch.equal(load(material.place()).model(tokens), ours)
        assert torch.allclose(pretrained(material.folder()).model()(tokens), ours, atol=1e-5)
        recipe = load_config(material.recipe("float32", 2, 3, 1, "cpu"))
        assert torch.equal(build_model(recipe, Device(torch.device("cpu"), "cpu")).eval()(tokens), ours)
    assert (recipe.training.batch_size, recipe.training.gradient_accumulation_steps) == (2, 3)
    assert (recipe.scheduler.kind, recipe.hardware.precision, recipe.hardware.threads) == ("constant", "float32", 1)
    assert material.folder() is material.folder()
    assert material.gguf("f32").stat().st_size > 4 * material.cost.parameters()


def test_rows_and_prompts(material: Material) -> None:
    rows = np.load(material.rows(7, 5))
    assert rows.shape == (5, 8)
    assert material.tokenizer.decode(rows.ravel().tolist()).startswith("Fellow")
    first = material.prompts(3, 20, 0)
    assert first == material.prompts(3, 20, 0)
    assert first != material.prompts(3, 20, 1)
    assert len({tuple(prompt) for prompt in first}) == 3
    assert all(len(prompt) == 20 for prompt in first)
    with pytest.raises(ConfigError, match="a context of 1000000"):
        material.prompts(1, 1_000_000)


def test_a_run_is_benched_with_its_weights(tmp_path: Path) -> None:
    model = disk_run(tmp_path / "run")
    (tmp_path / "scratch").mkdir()
    material = Material.of(str(tmp_path / "run"), [], tmp_path / "scratch")
    assert material.place() == str(tmp_path / "run")
    assert material.facts()["weights"] == "trained"
    assert torch.equal(material.model.embed_tokens.weight, model.embed_tokens.weight)
    assert torch.equal(load(material.native()).model.embed_tokens.weight, model.embed_tokens.weight)
    with pytest.raises(ConfigError, match="laid over a YAML file"):
        Material.of(str(tmp_path / "run"), ["model.hidden_size=8"], tmp_path)
