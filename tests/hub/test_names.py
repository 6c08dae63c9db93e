from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from tiny_models import ATTENTIONS, MOES, WIDTH, tiny_config, tiny_model
from torch import Tensor

from fathom.errors import CheckpointError
from fathom.hub.names import names_of
from fathom.model.transformer import Transformer

EVERY = [(a, m) for a in ATTENTIONS for m in MOES]


def biased(model: Transformer) -> Transformer:
    """Every number of the state is another: a bias of zeros would hide a mix-up."""
    for layer in model.moe_layers().values():
        layer.gate.e_score_correction_bias.normal_()
    return model


def on_disk(attention: str = "mla_low_rank", moe: str = "v3", depths: int = 1, **changes: object) -> dict[str, Tensor]:
    model = biased(tiny_model(attention, moe, depths, **changes))
    return names_of(model.config).to_disk(model.state_dict())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("depths", [0, 2])
@pytest.mark.parametrize(("attention", "moe"), EVERY)
def test_there_and_back_is_identity(attention: str, moe: str, depths: int, tied: bool) -> None:
    model = biased(tiny_model(attention, moe, depths, tie_word_embeddings=tied))
    names, state = names_of(model.config), model.state_dict()
    disk = names.to_disk(state)
    back = names.from_disk(load(save({k: v.contiguous() for k, v in disk.items()})))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name
    again = names.to_disk(back)
    assert disk.keys() == again.keys()
    assert all(torch.equal(disk[k], again[k]) for k in disk)
    assert sum(t.numel() for t in disk.values()) == sum(t.numel() for t in state.values())
    assert ("lm_head.weight" in disk) != tied


def test_names_on_disk_are_those_of_deepseek_v3() -> None:
    disk = on_disk()
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    common = [f"self_attn.{n}.weight" for n in attention] + [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]
    three = [f"{n}_proj.weight" for n in ("gate", "up", "down")]
    sparse = [*common, "mlp.gate.weight", "mlp.gate.e_score_correction_bias"]
    sparse += [f"mlp.shared_experts.{n}" for n in three] + [f"mlp.experts.{e}.{n}" for e in range(6) for n in three]
    want = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    want += [f"model.layers.0.{n}" for n in [*common, *(f"mlp.{n}" for n in three)]]
    want += [f"model.layers.{i}.{n}" for i in (1, 2) for n in sparse]
    want += [f"model.layers.2.{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm")]
    assert sorted(disk) == sorted(want)
    assert disk["model.layers.1.mlp.experts.5.gate_proj.weight"].shape == (12, WIDTH)
    assert disk["model.layers.1.mlp.experts.5.down_proj.weight"].shape == (WIDTH, 12)
    assert disk["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_gate_is_the_first_half_and_up_the_second() -> None:
    model = tiny_model()
    disk, stack = names_of(model.config).to_disk(model.state_dict()), model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(disk["model.layers.1.mlp.experts.4.gate_proj.weight"], stack[4, :12])
    assert torch.equal(disk["model.layers.1.mlp.experts.4.up_proj.weight"], stack[4, 12:])


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "expert missing"])
def test_other_tensors_are_refused_by_name(change: str) -> None:
    disk, name = on_disk(), "model.layers.1.mlp.experts.3.up_proj.weight"
    if change == "missing":
        disk.pop(name := "model.norm.weight")
    elif change == "extra":
        disk[name := "model.layers.1.mlp.experts.6.up_proj.weight"] = torch.zeros(1)
    elif change == "shape":
        disk[name] = disk[name].T
    else:
        disk.pop(name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        names_of(tiny_config()).from_disk(disk)
