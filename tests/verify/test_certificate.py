"""The certificate holds for models of every kind, and every check of it can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import ATTENTIONS, MOES, tiny_model

from fathom.generate import generator, speculative
from fathom.generate.sampling import Choice as Token
from fathom.model.attention.mla import MLA
from fathom.model.cost import Cost
from fathom.model.moe import router as routing
from fathom.model.moe.router import Choice, Router
from fathom.model.native import kernels
from fathom.model.rope import Rope
from fathom.model.transformer import Transformer
from fathom.tokenizer.train import byte
from fathom.verify.certificate import certify

Patch = Callable[[pytest.MonkeyPatch], None]
EXPERTS = ["the best s + b are chosen", "s is ", "the bias is in no gate value"]
REST = ["step by step = one pass", "greedy with caches = without", "parameters are", "cache bytes are"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fathom.verify.certificate.LENGTH", 16)


def made(attention: str = "mla_low_rank", moe: str = "v3", depths: int = 1) -> Transformer:
    model = tiny_model(attention, moe, depths, vocab_size=262, max_position_embeddings=32).eval()
    for layer in model.moe_layers().values():
        layer.gate.e_score_correction_bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(layer.layer))
    return model


@pytest.mark.parametrize(
    ("attention", "moe", "depths"),
    [(attention, "v3", 1) for attention in ATTENTIONS] + [("gqa", moe, 0) for moe in MOES] + [("mla", "v3", 2)],
)
def test_everything_holds(attention: str, moe: str, depths: int) -> None:
    checks = certify(made(attention, moe, depths), byte())
    assert [check for check in checks if not check.passed] == []
    wanted = EXPERTS * (moe != "dense") + ["absorbed"] * attention.startswith("mla") + REST
    wanted += ["greedy with MTP drafts"] * (depths > 0)
    assert len(checks) == len(wanted)
    assert all(any(check.name.startswith(start) for check in checks) for start in wanted)
    assert all(check.said for check in checks)


def wrapped(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """Let a function of the model be followed by a mistake."""
    original = getattr(owner, name)

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(owner, name, lambda *given, **named: change(original, *given, **named))

    return patch


def with_biased_weights(original: Any, router: Router, x: torch.Tensor) -> Choice:
    choice = original(router, x)
    weights = (choice.scores + router.e_score_correction_bias).gather(-1, choice.experts)
    return choice._replace(weights=router.scale * weights / weights.sum(-1, keepdim=True))


MISTAKES: dict[str, tuple[str, Patch]] = {
    "worst experts": (EXPERTS[0], wrapped(routing, "choose", lambda f, s, *rest: f(-s, *rest))),
    "no groups": (EXPERTS[0], wrapped(routing, "choose", lambda f, s, k, *rest: f(s, k, 1, 1, "max"))),
    "groups by their best": (
        EXPERTS[0],
        wrapped(routing, "choose", lambda f, s, k, groups, kept, score: f(s, k, groups, kept, "max")),
    ),
    "other affinities": (
        EXPERTS[1],
        wrapped(Router, "forward", lambda f, r, x: f(r, x)._replace(scores=f(r, x).scores * 1.01)),
    ),
    "bias in weights": (EXPERTS[2], wrapped(Router, "forward", with_biased_weights)),
    "absorbed values": ("absorbed", wrapped(MLA, "_absorbed", lambda f, *given: f(*given) * 1.001)),
    "positions from 0": (REST[0], wrapped(Rope, "at", lambda f, p, *rest: f(p - p.amin(-1, keepdim=True), *rest))),
    "another token": (REST[1], wrapped(generator, "choose", lambda f, *given: Token((f(*given).token + 1) % 262))),
    "another in a pass": (
        "greedy with MTP",
        wrapped(speculative, "choose", lambda f, *given: Token(f(*given).token ^ 1)),
    ),
    "parameters": (REST[2], wrapped(Cost, "parameters", lambda f, cost: f(cost) + 1)),
    "cache": (REST[3], wrapped(Cost, "cache_bytes_per_token", lambda f, cost, size: f(cost, size) + 2)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_check_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    check, patch = MISTAKES[name]
    monkeypatch.setattr(kernels, "serve", lambda x: False)  # the mistakes are made in the formulas
    patch(monkeypatch)
    failed = [found.name for found in certify(model, byte()) if not found.passed]
    assert any(found.startswith(check) for found in failed), failed


def test_what_is_no_number_does_not_pass() -> None:
    model = made()
    model.norm.weight.data[3] = float("nan")
    failed = [check for check in certify(model, byte()) if not check.passed]
    assert "step by step = one pass" in [check.name for check in failed]
    assert all(check.facts()["error"] is None or check.error > check.allowed for check in failed)


def test_it_leaves_the_model_as_it_was() -> None:
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    certify(model, byte())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="training mode"):
        certify(model.train(), byte())
