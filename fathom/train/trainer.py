"""The trainer: one optimizer step, and the loop around it.

    fetch the step's micro-batches, count their targets on all ranks       N
    forward and backward each, loss weighed by N                           every token of the step weighs alike
    sum gradients over ranks, take out the loss scale, clip, judge         guards.py
    update the weights, move the selection biases
    evaluate, sample, write rows, save                                     each at its interval

SIGINT and SIGTERM let the step end, save and leave; `Finish.exit_code` is then 128 + the signal's number (130, 143),
and a second signal interrupts at once. A run that is killed and resumed has the weights and tables of the run that was
not.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fathom.batch import Batch
from fathom.errors import CheckpointError
from fathom.knobs import Knobs, Many
from fathom.log import log
from fathom.optim.build import Optimizer
from fathom.optim.schedule import Schedule
from fathom.runtime import seed as random_state
from fathom.runtime.device import Device
from fathom.runtime.world import World
from fathom.train.callbacks import Callback, Evaluated, LayerRouting, Loader, Losses, Objective, StepReport
from fathom.train.checkpoint import PLAIN, Checkpoint, Names, RunFolder
from fathom.train.guards import Guard, GuardsConfig, LossScaler
from fathom.train.state import TrainState


class TrainingConfig(Knobs):
    """How long, how large, how often."""

    output_dir: str = "runs/run"
    """The run folder."""
    max_steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the whole run."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of a micro-batch, over all ranks."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches of an optimizer step."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a row."""
    seed: int = Field(default=0, ge=0)
    """Root of all random numbers."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between rows of the tables."""
    save_steps: int | None = Field(default=500, ge=1)
    """Steps between checkpoints; null: only at the end."""
    keep_last: int | None = Field(default=2, ge=1)
    """How many of the last checkpoints to keep; null: all."""
    keep_best: bool = True
    """Also keep (and write, when an evaluation finds it) the checkpoint with the lowest validation loss."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations; null: with every checkpoint. There is always one at the end."""
    eval_batches: int | None = Field(default=None, ge=1)
    """Batches of an evaluation; null: the whole validation set."""
    sample_frequency: int | None = Field(default=None, ge=1)
    """Steps between samples; null: none."""
    sample_prompts: Many[str] = ()
    """What samples begin with."""
    sample_max_tokens: int = Field(default=200, ge=1)
    """Length of a sample, in tokens."""
    sample_temperature: float = Field(default=0.7, ge=0)
    """0: greedy."""
    sample_top_p: float = Field(default=0.9, gt=0, le=1)
    """Draw from the likeliest tokens that make up this probability."""
    sample_top_k: int | None = Field(default=50, ge=1)
    """Draw from this many tokens; null: all."""
    guards: GuardsConfig = GuardsConfig()
    """When steps are skipped, and when the run stops."""


AfterStep = Callable[[Mapping[int, Tensor], float], None]


@dataclass(frozen=True)
class Finish:
    """How a session ended: after which step, and by which signal, if any."""

    step: int
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number, as a shell has it."""
        return 0 if self.signal is None else 128 + self.signal


class Trainer:
    """Trains a model; knows it only as something that an objective takes. Everything it needs is handed over:

    optimizer       `optim.build_optimizer`;  schedule  `optim.build_schedule`
    loader          endless micro-batches of this rank
    device, world   `runtime`
    gradient_clip   largest norm, or None
    sum_gradients   adds up gradients over ranks (`distributed.DataParallel.sum_gradients`); None when alone
    folder          where checkpoints go; None: nowhere
    names           tensor names on disk
    evaluate        () -> loss and bits per byte, the model being in eval mode; every rank calls it
    sample          step -> [(prompt, text)]; rank 0 calls it
    after_step      called with (counts by MoE layer, progress) after every step that was taken: `model.balance_step`
    biases          () -> selection bias by MoE layer, for experts.csv
    callbacks       listeners; their order is the order of calls. Ranks other than 0 ignore them
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        schedule: Schedule,
        loader: Loader,
        device: Device,
        *,
        world: World | None = None,
        gradient_clip: float | None = 1.0,
        sum_gradients: Callable[[], None] | None = None,
        folder: RunFolder | None = None,
        names: Names = PLAIN,
        evaluate: Callable[[], Evaluated] | None = None,
        sample: Callable[[int], Sequence[tuple[str, str]]] | None = None,
        after_step: Sequence[AfterStep] = (),
        biases: Callable[[], Mapping[int, Tensor]] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config, self.model, self.objective = config, model, objective
        self.optimizer, self.schedule, self.loader = optimizer, schedule, loader
        self.device, self.world = device, world or World()
        self.gradient_clip, self.sum_gradients = gradient_clip, sum_gradients
        self.folder, self.names = folder, names
        self.evaluate, self.sample = evaluate, sample
        self.after_step, self.biases = tuple(after_step), biases
        self.callbacks = list(callbacks) if self.world.is_first else []
        self.state = TrainState()
        guards = config.guards
        scaling = device.needs_loss_scaling
        scale = guards.initial_loss_scale if scaling else 1.0
        self.guard = Guard(guards, LossScaler(scale, guards.scale_growth_interval, enabled=scaling))
        self._began = time.monotonic()
        self._seconds_before = 0.0
        self._saved: int | None = None
        self._signal: int | None = None

    # One step -------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """One optimizer step. Raises TrainingError when the guard says that the run should stop."""
        start = time.perf_counter()
        self.model.train()
        batches = [next(self.loader) for _ in range(self.config.gradient_accumulation_steps)]
        local = [float(b.target_count) for b in batches], [float(len(b)) for b in batches]
        tokens, rows = (int(n) for n in self.world.sums([sum(local[0]), sum(local[1])], self.device.torch_device))
        factor = self.schedule(self.state.step)
        self.optimizer.set_factor(factor)
        sums = _StepSums()
        for batch in batches:
            sums.add(
                self._forward_backward(batch, max(1, tokens), len(batch) / max(1, rows)), len(batch) / max(1, rows)
            )
        totals = sums.over_ranks(self.world, self.device)
        norm = self._gradient_norm()
        loss = totals.next_token / max(1, tokens)
        # progress counts this step as done, so that a rate that ends at 0 is 0 in the last step
        step = self.state.step + 1
        skipped = self.guard.judge(step, loss, norm) if tokens else "no targets"
        if skipped is None:
            self.optimizer.step()
            for hook in self.after_step:
                hook(totals.counts, step / self.config.max_steps)
        self.optimizer.zero_grad()
        self.state.step, self.state.tokens, self.state.val_loss = step, self.state.tokens + tokens, None
        return StepReport(
            step=step,
            max_steps=self.config.max_steps,
            tokens=tokens,
            tokens_seen=self.state.tokens,
            epoch=getattr(self.loader, "epoch", None),
            loss=loss,
            mtp_tokens=totals.mtp_tokens,
            mtp_sums=totals.mtp,
            balance_loss=totals.balance if totals.counts else None,
            lr=self.optimizer.lr * factor,
            grad_norm=norm,
            loss_scale=self.guard.scaler.scale,
            skipped=skipped,
            seconds=time.perf_counter() - start,
            elapsed=self.elapsed,
            routing=self._routing(totals),
        )

    def _forward_backward(self, batch: Batch, tokens: int, share: float) -> Losses:
        if self.device.kind == "cuda":
            batch = batch.to(self.device.torch_device)
        progress = self.state.step / self.config.max_steps
        with self.device.arithmetic():
            with self.device.autocast():
                losses = self.objective(self.model, batch, token_count=tokens, batch_share=share, progress=progress)
            total = losses.total * self.guard.scaler.scale if self.guard.scaler.enabled else losses.total
            total.backward()
        return losses

    @torch.no_grad()
    def _gradient_norm(self) -> float:
        """Sum gradients over ranks, take the loss scale out, clip; the norm before clipping, infinite or nan if a
        gradient is. A weight that no token reached has gradient 0, so that it decays like the others on any number of
        ranks."""
        for weight in self.optimizer.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        if self.sum_gradients is not None:
            self.sum_gradients()
        gradients = [w.grad for w in self.optimizer.weights if w.grad is not None]
        scale = self.guard.scaler.scale if self.guard.scaler.enabled else 1.0
        norm = float(nn.utils.get_total_norm(gradients)) / scale
        shrink = 1.0 / scale
        if self.gradient_clip is not None and norm > self.gradient_clip:
            shrink *= self.gradient_clip / (norm + 1e-6)
        if shrink != 1.0 and math.isfinite(norm):
            torch._foreach_mul_(gradients, shrink)
        return norm

    def _routing(self, totals: _Totals) -> dict[int, LayerRouting]:
        biases = self.biases() if self.biases is not None and totals.counts else {}
        return {
            layer: LayerRouting(
                tuple(counts.tolist()),
                totals.dropped[layer],
                totals.entropy[layer],
                tuple(biases[layer].tolist()) if layer in biases else (),
            )
            for layer, counts in totals.counts.items()
        }

    # The loop -------------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Wall-clock seconds of the run, earlier sessions included."""
        return self._seconds_before + time.monotonic() - self._began

    def run(self) -> Finish:
        """Train until max_steps or a signal."""
        self._began = time.monotonic()
        with contextlib.ExitStack() as stack:
            if self.folder is not None and self.world.is_first:
                stack.callback(self.folder.lock().release)
            stack.enter_context(self._signals())
            gone = self._forget_future()
            self._tell("on_start", self.state.step, self.config.max_steps)
            stack.callback(lambda: self._tell("on_end", self.state.step))
            if self.state.step:
                self._event("resumed")
            if gone:
                log.warning("checkpoints past step %d are dropped: %s", self.state.step, gone)
            while self.state.step < self.config.max_steps:
                report = self.step()
                self._tell("on_step", report)
                if report.skipped is not None:
                    self._event(
                        f"skipped: {report.skipped}", loss=_finite(report.loss), grad_norm=_finite(report.grad_norm)
                    )
                better = self._evaluate_and_sample()
                self._tell("on_step_end", self.state.step)
                stop = self._stopped()
                if self._due(self.config.save_steps) or stop is not None or (better and self.config.keep_best):
                    self.save()
                if stop is not None:
                    log.info("%s: saved after step %d", signal.Signals(stop).name, self.state.step)
                    return Finish(self.state.step, stop)
        return Finish(self.state.step)

    def _due(self, every: int | None) -> bool:
        step = self.state.step
        return step == self.config.max_steps or (every is not None and step % every == 0)

    def _evaluate_and_sample(self) -> bool:
        """Look at the model where it is time; whether the validation loss is the lowest so far. Looking changes
        nothing: the model's mode and the random generators are put back."""
        config, step = self.config, self.state.step
        evaluate = self.evaluate if self._due(config.eval_steps or config.save_steps) else None
        wanted = config.sample_frequency is not None and self._due(config.sample_frequency)
        sample = self.sample if wanted and self.world.is_first else None
        better = False
        if evaluate is None and sample is None:
            return better
        before = random_state.capture()
        self.model.eval()
        try:
            with torch.no_grad():
                if evaluate is not None:
                    found = evaluate()
                    better = self.state.evaluated(found.loss) if math.isfinite(found.loss) else False
                    self._tell("on_evaluation", step, found)
                if sample is not None:
                    self._tell("on_samples", step, sample(step))
        finally:
            self.model.train()
            random_state.restore(before)
        return better

    def _tell(self, what: str, *facts: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(*facts)

    def _event(self, kind: str, **facts: Any) -> None:
        for callback in self.callbacks:
            callback.on_event(self.state.step, kind, **facts)

    def _stopped(self) -> int | None:
        """The signal that some rank got, agreed by all (the largest number, should they differ)."""
        if self.world.size == 1:
            return self._signal
        flags = torch.zeros(self.world.size, dtype=torch.int64, device=self.device.torch_device)
        flags[self.world.rank] = self._signal or 0
        return int(self.world.sum_(flags).max()) or None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM set a mark; a second one gets its usual effect. Only the main thread can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual: dict[int, Any] = {}

        def mark(number: int, frame: Any) -> None:
            self._signal = number
            log.info("%s: the step ends, then the run is saved", signal.Signals(number).name)
            for each, handler in usual.items():
                signal.signal(each, handler or signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            usual[number] = signal.signal(number, mark)
        try:
            yield
        finally:
            for each, handler in usual.items():
                signal.signal(each, handler or signal.SIG_DFL)

    # Checkpoints ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the current step, once, and delete what need not be kept. CheckpointError when the
        disk refuses."""
        if self.folder is None or self._saved == self.state.step:
            return
        self.state.seconds = self.elapsed
        own = {f"rank{self.world.rank}.{k}": v for k, v in random_state.capture().items()}
        rng = {k: v for each in self.world.gather(own) for k, v in each.items()}
        failed: str | None = None
        if self.world.is_first:
            self._tell("flush")
            trainer = {
                "state": self.state.to_dict(),
                "loader": self.loader.state_dict(),
                "guard": self.guard.state_dict(),
                "callbacks": self._callback_states(),
                "world": self.world.size,
            }
            try:
                self.folder.save(
                    self.state.step, self.model.state_dict(), self.optimizer.state_dict(), rng, trainer, self.names
                )
                best = {self.state.best_step} if self.config.keep_best and self.state.best_step is not None else set()
                self.folder.prune(self.config.keep_last, best | {self.state.step})
            except CheckpointError as error:
                failed = str(error)
        for message in self.world.gather(failed):
            if message:
                raise CheckpointError(message)
        self._saved = self.state.step
        self._event("checkpoint")

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint: weights, moments, loss scale, loader, generators, counters and the tables'
        accumulators; of an imported one the weights, and all else begins."""
        checkpoint.load_model(self.model, self.names)
        if checkpoint.imported:
            return
        self.optimizer.load_state_dict(checkpoint.optimizer_state())
        saved = checkpoint.trainer
        try:
            self.state = TrainState.from_dict(saved["state"])
            self.loader.load_state_dict(saved["loader"])
            self.guard.load_state_dict(saved["guard"])
            states = {type(c).__name__: c for c in self.callbacks}
            for name, state in saved["callbacks"].items():
                if name in states:
                    states[name].load_state_dict(state)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.path}/trainer.json lacks {error}; it is of another version") from error
        own = checkpoint.rng_state(self.world.rank)
        if own is not None:
            random_state.restore(own)
        if saved["world"] != self.world.size:
            log.warning(
                "the run was on %d ranks and goes on with %d: sums run in another order, so weights differ in their "
                "last bits",
                saved["world"],
                self.world.size,
            )
        self._seconds_before, self._saved = self.state.seconds, self.state.step

    def _callback_states(self) -> dict[str, Any]:
        return {type(c).__name__: state for c in self.callbacks if (state := c.state_dict())}

    def _forget_future(self) -> list[int]:
        if self.folder is None or not self.world.is_first:
            return []
        return self.folder.forget_after(self.state.step)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class _Totals:
    """Sums of one optimizer step, over micro-batches and ranks; balance is a mean, weighed by rows."""

    next_token: float
    balance: float
    mtp: tuple[float, ...]
    mtp_tokens: tuple[int, ...]
    counts: dict[int, Tensor]
    dropped: dict[int, int]
    entropy: dict[int, float]


class _StepSums:
    """Adds up losses of micro-batches on the device, in float64 (counts are exact), and comes to the CPU once a
    step."""

    def __init__(self) -> None:
        self.flat: Tensor | None = None
        self.depths = 0
        self.layers: list[tuple[int, int]] = []  # (number, experts)
        self.batches = 0

    def add(self, losses: Losses, share: float) -> None:
        reports = list(losses.routing)
        self.depths = max(self.depths, losses.mtp.numel())
        self.layers = [(int(r.layer), r.counts.numel()) for r in reports]
        parts = [losses.next_token.reshape(1), (losses.balance * share).reshape(1), losses.mtp, losses.mtp_tokens]
        for report in reports:
            parts += [report.counts, report.dropped.reshape(1), report.entropy.reshape(1)]
        flat = torch.cat([p.detach().to(torch.float64) for p in parts])
        self.flat = flat if self.flat is None else self.flat + flat
        self.batches += 1

    def over_ranks(self, world: World, device: Device) -> _Totals:
        assert self.flat is not None
        values = world.sum_(self.flat).cpu()
        depths = self.depths
        at = 2 + 2 * depths
        counts, dropped, entropy = {}, {}, {}
        for layer, experts in self.layers:
            counts[layer] = values[at : at + experts].round().to(torch.int64)
            dropped[layer] = int(values[at + experts])
            entropy[layer] = float(values[at + experts + 1]) / (self.batches * world.size)
            at += experts + 2
        return _Totals(
            next_token=float(values[0]),
            balance=float(values[1]),
            mtp=tuple(values[2 : 2 + depths].tolist()),
            mtp_tokens=tuple(int(n) for n in values[2 + depths : 2 + 2 * depths].tolist()),
            counts=counts,
            dropped=dropped,
            entropy=entropy,
        )
