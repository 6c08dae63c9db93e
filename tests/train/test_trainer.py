"""The trainer: weighing of tokens, clipping, loss scale, guards, intervals, and that looking changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_training import EXPERTS, Toy, ToyLoader, objective, toy_trainer

from fathom.batch import Batch
from fathom.errors import TrainingError
from fathom.optim.build import AdamWConfig, build_optimizer
from fathom.train.callbacks import Callback, StepReport
from fathom.train.guards import GuardsConfig
from fathom.train.trainer import Finish


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Listener(Callback):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.heard: list[tuple[str, int]] = []

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_evaluation(self, step: int, evaluated: Any) -> None:
        self.heard.append(("evaluation", step))

    def on_samples(self, step: int, samples: Any) -> None:
        self.heard.append(("samples", step))

    def on_event(self, step: int, kind: str, **facts: Any) -> None:
        self.heard.append((kind, step))

    def on_end(self, step: int) -> None:
        self.heard.append(("end", step))


class OneBatch(ToyLoader):
    """The rows of `count` micro-batches of a loader, as one."""

    def __init__(self, loader: ToyLoader, count: int) -> None:
        super().__init__(loader.rows, loader.length)
        self.inner, self.count = loader, count

    def __next__(self) -> Batch:
        parts = [next(self.inner) for _ in range(self.count)]
        return Batch(*(torch.cat([getattr(p, n) for p in parts]) for n in ("tokens", "targets", "positions")))


def test_accumulation_weighs_every_token_alike() -> None:
    many, one = Listener(), Listener()
    toys = []
    for listener, loader, accumulation in (
        (many, ToyLoader(ragged=True), 4),
        (one, OneBatch(ToyLoader(ragged=True), 4), 1),
    ):
        trainer = toy_trainer(
            loader=loader, gradient_accumulation_steps=accumulation, dropout=0.0, callbacks=[listener], kind="adamw"
        )
        trainer.run()
        toys.append(trainer.model)
    for a, b in zip(many.reports, one.reports, strict=True):
        assert (a.tokens, a.tokens_seen, a.mtp_tokens) == (b.tokens, b.tokens_seen, b.mtp_tokens)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.balance_loss == pytest.approx(b.balance_loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert a.routing[1].counts == b.routing[1].counts
        assert sum(a.routing[1].counts) == 4 * 4 * 7
    for a, b in zip(toys[0].parameters(), toys[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_toy_learns() -> None:
    listener = Listener()
    assert toy_trainer(callbacks=[listener], max_steps=60).run() == Finish(60)
    assert listener.reports[-1].loss < 0.5 * listener.reports[0].loss


def test_clipping_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(dropout=0.0)
    trainer.gradient_clip = 0.25
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda: seen.append([w.grad.clone() for w in trainer.optimizer.weights])
    )
    norm = trainer.step().grad_norm
    reference = toy_trainer(dropout=0.0)
    for _ in range(2):
        batch = next(reference.loader)
        objective(reference.model, batch, token_count=56, batch_share=0.5, progress=0.0).total.backward()
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(reference.optimizer.weights, 0.25)), rel=1e-5)
    for ours, theirs in zip(seen[0], reference.optimizer.weights, strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_arithmetic_learns_about_the_same(dtype: torch.dtype) -> None:
    listener = Listener()
    trainer = toy_trainer(dtype=dtype, callbacks=[listener], max_steps=30, dropout=0.0)
    trainer.run()
    taken = [r for r in listener.reports if r.skipped is None]
    assert len(taken) > 20
    assert all(w.dtype == torch.float32 for w in trainer.optimizer.weights)
    assert (listener.reports[0].loss_scale > 1) == (dtype == torch.float16)
    # the loss scale is taken out of the norm, to a factor of rounding
    exact = Listener()
    toy_trainer(callbacks=[exact], max_steps=30, dropout=0.0).run()
    assert taken[-1].loss == pytest.approx(exact.reports[-1].loss, rel=0.1)
    assert taken[-1].loss < 0.2 * taken[0].loss
    if listener.reports[0].skipped is None:
        assert taken[0].grad_norm == pytest.approx(exact.reports[0].grad_norm, rel=0.05)


def broken_at(steps: set[int], value: float) -> Any:
    """An objective whose loss (and gradient) is not finite in some steps; two micro-batches a step."""
    calls = iter(range(10**6))

    def goal(model: nn.Module, batch: Batch, **named: Any) -> Any:
        losses = objective(model, batch, **named)
        if next(calls) // 2 + 1 in steps:
            losses.total = losses.total * value
            losses.next_token = losses.next_token * value
        return losses

    return goal


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(value: float) -> None:
    listener = Listener()
    trainer = toy_trainer(goal=broken_at({3}, value), callbacks=[listener])
    for _ in range(2):
        trainer.step()
    before, moments = weights(trainer.model), {k: v.clone() for k, v in trainer.optimizer.state_dict().items()}
    report = trainer.step()
    assert report.skipped == "loss not finite"
    assert same(before, weights(trainer.model))  # the selection bias, a buffer, is among them
    assert same(moments, trainer.optimizer.state_dict())
    assert all(w.grad is None for w in trainer.optimizer.weights)
    assert trainer.step().skipped is None
    assert all(torch.isfinite(w).all() for w in trainer.model.parameters())
    assert (trainer.state.step, trainer.guard.total) == (4, 1)


def test_a_run_that_never_recovers_stops_with_a_message(tmp_path: Path) -> None:
    trainer = toy_trainer(
        tmp_path / "run", goal=broken_at(set(range(6, 99)), math.nan), max_steps=50, guards=GuardsConfig(max_skipped=3)
    )
    with pytest.raises(TrainingError, match=r"step 8: loss not finite, 3 skipped steps in a row"):
        trainer.run()
    assert trainer.folder is not None
    assert trainer.folder.latest().step == 5  # an improved evaluation was saved before the trouble
    events = (tmp_path / "run/events.jsonl").read_text()
    assert events.count("skipped: loss not finite") == 2


def test_intervals(tmp_path: Path) -> None:
    listener = Listener()
    trainer = toy_trainer(tmp_path / "run", callbacks=[listener], max_steps=11, keep_last=None, keep_best=False)
    trainer.run()
    assert [s for k, s in listener.heard if k == "evaluation"] == [5, 10, 11]
    assert [s for k, s in listener.heard if k == "samples"] == [5, 10, 11]
    assert [s for k, s in listener.heard if k == "checkpoint"] == [4, 8, 11]
    assert listener.heard[-1] == ("end", 11)
    assert trainer.folder is not None
    assert trainer.folder.complete() == [4, 8, 11]


def test_looking_changes_nothing() -> None:
    looked = toy_trainer(eval_steps=1, sample_frequency=1)
    looked.run()
    blind = toy_trainer()  # after the other's run: chance is the process's own
    blind.evaluate = blind.sample = None
    blind.run()
    assert same(weights(looked.model), weights(blind.model))
    assert looked.model.training


def test_the_balance_step_gets_the_counts_of_all_micro_batches_and_ends_at_no_rate() -> None:
    seen: list[tuple[int, float]] = []
    trainer = toy_trainer(gradient_accumulation_steps=3)
    trainer.after_step = (lambda counts, progress: seen.append((int(counts[1].sum()), progress)),)
    trainer.run()
    assert len(seen) == 12
    assert {n for n, _ in seen} == {3 * 4 * 7}
    assert seen[-1][1] == 1.0


def test_a_weight_that_nothing_reached_decays_all_the_same() -> None:
    model = Toy()
    model.register_parameter("idle", nn.Parameter(torch.ones(EXPERTS, 5)))
    trainer = toy_trainer(model=model, kind="adamw")
    trainer.optimizer = build_optimizer(model, AdamWConfig(lr=0.1, weight_decay=0.5))
    trainer.step()
    assert 0.9 < float(model.idle.detach().mean()) < 1.0
