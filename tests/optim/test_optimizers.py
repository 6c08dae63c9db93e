"""Building optimizers: who moves which weight, state by names, equal to torch's AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fathom.errors import CheckpointError
from fathom.optim.build import AdamWConfig, MuonConfig, Optimizer, OptimizerConfig, build_optimizer
from fathom.optim.groups import split
from fathom.optim.muon import Muon

EVERY = [AdamWConfig(lr=0.01), MuonConfig(kind="muon", lr=0.01), MuonConfig(kind="muon", lr=0.01, router="adamw")]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed_tokens = nn.Embedding(11, 5)
        self.mlp = nn.ModuleDict({"gate": nn.Linear(5, 3, bias=False), "gate_proj": nn.Linear(5, 5)})
        self.experts = nn.Parameter(torch.randn(3, 5, 5))
        self.norm = nn.LayerNorm(5)
        self.lm_head = nn.Linear(5, 11, bias=False)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.mlp["gate_proj"](self.embed_tokens(x))
        h = h + torch.einsum("be,bd,edf->bf", self.mlp["gate"](h).sigmoid(), h, self.experts)
        return self.lm_head(self.norm(h))


def train(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.set_factor(1 / (step + 1))
        model(torch.arange(7) + step % 4).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_groups() -> None:
    groups = split(Small())
    assert set(groups.matrices) == {"mlp.gate_proj.weight", "experts"}
    assert set(groups.routers) == {"mlp.gate.weight"}
    assert set(groups.tables) == {"embed_tokens.weight", "lm_head.weight"}
    assert set(groups.vectors) == {"mlp.gate_proj.bias", "norm.weight", "norm.bias"}


@pytest.mark.parametrize("config", EVERY, ids=lambda c: f"{c.kind}")
def test_every_trainable_weight_moves_once(config: AdamWConfig | MuonConfig) -> None:
    model = Small()
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    owned = [w for part in optimizer.parts for group in part.param_groups for w in group["params"]]
    assert len(owned) == len({id(w) for w in owned}) == len(before) - 1
    train(model, optimizer, 1)
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert moved == set(before) - {"frozen"}


@pytest.mark.parametrize("router", ["muon", "adamw"])
def test_who_is_moved_by_muon(router: Any) -> None:
    model = Small()
    optimizer = build_optimizer(model, MuonConfig(kind="muon", router=router))
    muon = next(p for p in optimizer.parts if isinstance(p, Muon))
    ids = {id(w) for group in muon.param_groups for w in group["params"]}
    names = {n for n, w in model.named_parameters() if id(w) in ids}
    assert names == {"mlp.gate_proj.weight", "experts"} | ({"mlp.gate.weight"} if router == "muon" else set())


def test_adamw_is_torchs_with_decay_on_matrices_alone() -> None:
    ours, theirs = Small(), Small()
    optimizer = build_optimizer(ours, AdamWConfig(lr=0.01, weight_decay=0.3))
    named = dict(theirs.named_parameters())
    decayed = [w for w in named.values() if w.requires_grad and w.ndim > 1]
    plain = [w for w in named.values() if w.requires_grad and w.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95), lr=0.01
    )
    for step in range(3):
        for group in reference.param_groups:
            group["lr"] = 0.01 / (step + 1)
        theirs(torch.arange(7) + step % 4).square().mean().backward()
        reference.step()
        reference.zero_grad()
    train(ours, optimizer, 3)
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, named[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: f"{c.kind}")
def test_state_goes_on_to_the_byte(config: AdamWConfig | MuonConfig) -> None:
    straight = Small()
    train(straight, build_optimizer(straight, config), 5)
    broken = Small()
    first = build_optimizer(broken, config)
    train(broken, first, 2)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    second = build_optimizer(broken, config)
    second.load_state_dict(state)
    train(broken, second, 3, start=2)
    for (name, a), b in zip(straight.named_parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = Small()
    adamw = build_optimizer(model, AdamWConfig())
    train(model, adamw, 1)
    with pytest.raises(CheckpointError, match="does not know"):
        build_optimizer(Small(), MuonConfig(kind="muon")).load_state_dict(adamw.state_dict())


def test_weights_are_float32() -> None:
    with pytest.raises(TypeError, match="float32"):
        build_optimizer(Small().bfloat16(), AdamWConfig())


@pytest.mark.parametrize(
    "bad", [{"kind": "sgd"}, {"kind": "adamw", "betas": [0.9]}, {"kind": "adamw", "momentum": 0.9}]
)
def test_bad_configurations_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(OptimizerConfig).validate_python(bad)
