"""The same weights in transformers' own classes give the same logits and gradients, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_model
from tiny_models import close, tokens_of

from fathom.hub.family import BIAS
from fathom.hub.huggingface import FAMILIES, choose, export, pretrained, weights_of
from fathom.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

SEEDS = {"deepseek_v3": 8, "deepseek_v2": 6, "qwen2_moe": 4, "ernie4_5_moe": 4, "mixtral": 3, "llama": 2}
EVERY = [(family, seed) for family, count in SEEDS.items() for seed in range(count)]
TOKENS = tokens_of(2, 17)


def theirs(folder: Path) -> Any:
    """transformers' model, nothing missing and nothing left over."""
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager"
    )
    assert not said["missing_keys"]
    assert not said["mismatched_keys"]
    assert not said["unexpected_keys"], said["unexpected_keys"]
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize(("family", "seed"), EVERY)
def test_export_is_the_same_function_in_transformers_and_comes_back(family: str, seed: int, tmp_path: Path) -> None:
    model = random_model(family, seed)
    done = export(model.config, weights_of(model), tmp_path / "out", family=family)
    assert done.family == family
    other = theirs(tmp_path / "out")
    assert type(other).__name__ == FAMILIES[family].architecture
    ours, reference = model(TOKENS), other(TOKENS, use_cache=False).logits
    assert close(ours, reference, 1e-4)

    found = pretrained(tmp_path / "out")
    assert found.family == family
    back = found.model()
    with torch.no_grad():
        assert close(back(TOKENS), ours, 1e-5)
    if family.startswith("deepseek"):
        compare_gradients(model, other, ours, reference)
        assert sorted(back.state_dict()) == sorted(model.state_dict())
        biases = {n for n in model.state_dict() if n.endswith(BIAS) and family == "deepseek_v2"}
        assert all(torch.equal(back.state_dict()[n], w) for n, w in model.state_dict().items() if n not in biases)


def compare_gradients(model: Transformer, other: Any, ours: torch.Tensor, reference: torch.Tensor) -> None:
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    (ours * pull).sum().backward()
    (reference * pull).sum().backward()
    own = dict(model.named_parameters())
    pairs = {
        n: (own[n.removeprefix("model.")], w) for n, w in other.named_parameters() if n.removeprefix("model.") in own
    }
    assert len(pairs) == len(own)
    for name, (mine, its) in pairs.items():
        assert close(mine.grad, its.grad, 1e-3), name


def config_of(family: str, seed: int) -> Any:
    """A configuration of theirs, with the keys of a model of ours and everything else at their defaults."""
    model = random_model(family, seed)
    keys = FAMILIES[family].describe(model.config)
    made = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    made.initializer_range = 0.2
    return made


@pytest.mark.parametrize(("family", "seed"), [(f, s) for f, s in EVERY if s < 3])
def test_what_transformers_saved_is_read(family: str, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    other = transformers.AutoModelForCausalLM.from_config(
        config_of(family, seed), experts_implementation="eager"
    ).eval()
    for name, buffer in other.named_buffers():
        if name.endswith(BIAS):
            buffer.normal_(0, 0.3)
    for name, weight in other.named_parameters():
        if name.endswith(("shared_expert_gate.weight", "_proj.bias")):  # ours have none
            weight.data.zero_()
    other.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if seed % 2 else "1GB")
    back = pretrained(tmp_path / "theirs").model()
    with torch.no_grad():
        assert close(back(TOKENS), logits_of(other), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_finds_a_family(family: str) -> None:
    model = random_model(family, 1)
    found = choose(model.config, weights_of(model)).model_type
    assert found == {"mixtral": "qwen2_moe"}.get(family, family)


def test_config_has_what_no_engine_should_guess(tmp_path: Path) -> None:
    model = random_model("deepseek_v3", 0, depths=0)
    export(model.config, weights_of(model), tmp_path / "out")
    keys = json.loads((tmp_path / "out/config.json").read_text())
    wanted = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True}
    wanted |= {"num_nextn_predict_layers": 0, "attention_bias": False, "hidden_act": "silu", "dtype": "float32"}
    assert wanted.items() <= keys.items()
    assert keys["rope_parameters"]["rope_type"] == keys["rope_scaling"]["type"] == "yarn"
    assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"]
    assert keys["num_key_value_heads"] == keys["num_attention_heads"]
