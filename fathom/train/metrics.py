"""Tables of a run, and other places where its figures go.

    metrics.csv   a row a logged step (and one for every evaluation). Losses are nats a token, mean since the row
                  before; mtp_loss the mean over depths; grad_norm the mean over steps that were taken; seconds counts
                  earlier sessions
    experts.csv   a row an expert, MoE layer and logged step. load: its share of the layer's assignments since the row
                  before (all shares of a layer sum to 1; a fair share is 1 / E). The rest is the layer's, repeated:
                  max_vio = (max load - mean) / mean, entropy of the mean gate in nats, dead experts (no assignment),
                  dropped assignments
    samples.csv   a row a prompt
    events.jsonl  what is not in a table: skipped steps, checkpoints, sessions
    hardware.csv  see `monitor.py`

A cell that was not measured is empty. Every table begins with the step, and a resumed run first drops the rows past
its checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from fathom.errors import DependencyError
from fathom.knobs import Knobs
from fathom.train.callbacks import Callback, Evaluated, StepReport
from fathom.train.checkpoint import write_whole
from fathom.train.monitor import Monitor
from fathom.train.tables import Table, append, keep_events, sync

METRICS = [
    "step",
    "tokens",
    "epoch",
    "train_loss",
    "val_loss",
    "val_bpb",
    "mtp_loss",
    "balance_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "seconds",
]
EXPERTS = ["step", "layer", "expert", "load", "bias", "max_vio", "entropy", "dead", "dropped"]
SAMPLES = ["step", "prompt", "generated_text"]


class WandbConfig(Knobs):
    """Weights & Biases; the package `wandb` must be installed."""

    project: str = "fathom"
    """Name of the project."""
    entity: str | None = None
    """User or team; null: your own."""
    name: str | None = None
    """Name of the run; null: the run folder's."""
    mode: Literal["online", "offline"] = "online"
    """offline: files only, nothing leaves the machine."""


class LoggingConfig(Knobs):
    """Where a run's figures go beside its tables."""

    progress: Literal["auto", "bar", "lines", "quiet"] = "auto"
    """bar: a progress bar; lines: a line a logged step; auto: a bar on a terminal, else lines."""
    tensorboard: bool = False
    """Also write TensorBoard events (package tensorboard) into the run folder."""
    wandb: WandbConfig | None = None
    """Also send figures to Weights & Biases."""
    hardware_seconds: float = Field(default=10.0, ge=0)
    """Seconds between rows of hardware.csv; 0: none."""


class Sink(Protocol):
    """Takes rows of metrics; an absent figure is None."""

    def metrics(self, row: Mapping[str, Any]) -> None: ...
    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None: ...
    def close(self) -> None: ...


class Metrics(Callback):
    """Gathers step reports into rows and writes the tables; sinks get the same rows.

    flops_per_token: of training, forward and backward; peak_flops: 100 % of MFU, of all ranks together. Without
    either, mfu is empty.
    """

    def __init__(
        self,
        folder: Path,
        logging_steps: int,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.folder, self.every = folder, logging_steps
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.sinks = list(sinks)
        self.last: StepReport | None = None
        self.evaluated: Evaluated | None = None
        self.max_steps = 0
        self.sums = _Sums()

    def on_start(self, step: int, max_steps: int) -> None:
        self.max_steps = max_steps
        self.metrics = Table(self.folder / "metrics.csv", METRICS, step)
        self.samples = Table(self.folder / "samples.csv", SAMPLES, step)
        self.experts: Table | None = None
        if (self.folder / "experts.csv").exists():
            self.experts = Table(self.folder / "experts.csv", EXPERTS, step)
        keep_events(self.folder / "events.jsonl", step)

    def on_step(self, report: StepReport) -> None:
        self.last = report
        self.sums.add(report)

    def on_evaluation(self, step: int, evaluated: Evaluated) -> None:
        self.evaluated = evaluated

    def on_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        self.samples.add(*({"step": step, "prompt": p, "generated_text": t} for p, t in samples))
        for sink in self.sinks:
            sink.samples(step, samples)

    def on_step_end(self, step: int) -> None:
        if self.last is None or not (step % self.every == 0 or step == self.max_steps or self.evaluated is not None):
            return
        row = self.row(self.last)
        self.metrics.add(row)
        experts = self.sums.expert_rows(self.last)
        if experts:
            if self.experts is None:
                self.experts = Table(self.folder / "experts.csv", EXPERTS, step)
            self.experts.add(*experts)
        for sink in self.sinks:
            sink.metrics(row)
        self.sums, self.evaluated = _Sums(), None

    def row(self, report: StepReport) -> dict[str, Any]:
        """The row of metrics.csv that would be written now."""
        sums = self.sums
        speed = sums.all_tokens / sums.seconds if sums.seconds > 0 else None
        flops, peak = self.flops_per_token, self.peak_flops
        return {
            "step": report.step,
            "tokens": report.tokens_seen,
            "epoch": report.epoch,
            "train_loss": sums.loss / sums.tokens if sums.tokens else None,
            "val_loss": None if self.evaluated is None else self.evaluated.loss,
            "val_bpb": None if self.evaluated is None else self.evaluated.bits_per_byte,
            "mtp_loss": sums.mtp_loss,
            "balance_loss": sums.balance / sums.balance_steps if sums.balance_steps else None,
            "lr": report.lr,
            "grad_norm": sums.norm / sums.taken if sums.taken else None,
            "tokens_per_second": speed,
            "mfu": speed * flops / peak if speed and flops and peak else None,
            "seconds": report.elapsed,
        }

    def on_event(self, step: int, kind: str, **facts: Any) -> None:
        append(self.folder / "events.jsonl", json.dumps({"step": step, "event": kind, **facts}) + "\n")

    def on_end(self, step: int) -> None:
        for sink in self.sinks:
            sink.close()

    def flush(self) -> None:
        for name in ("metrics.csv", "experts.csv", "samples.csv", "events.jsonl"):
            sync(self.folder / name)

    def state_dict(self) -> dict[str, Any]:
        return self.sums.to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = _Sums.from_dict(state)


class _Sums:
    """Sums since the last row. Times are left out of `to_dict`: they are of this session."""

    PLAIN = ("loss", "tokens", "all_tokens", "norm", "taken", "balance", "balance_steps", "mtp", "mtp_tokens")

    def __init__(self) -> None:
        self.loss = self.norm = self.balance = self.seconds = 0.0
        self.tokens = self.all_tokens = self.taken = self.balance_steps = 0
        self.mtp: list[float] = []
        self.mtp_tokens: list[int] = []
        self.routing: dict[int, dict[str, Any]] = {}

    def add(self, report: StepReport) -> None:
        self.all_tokens += report.tokens
        self.seconds += report.seconds
        if report.skipped is None:
            self.norm += report.grad_norm
            self.taken += 1
        if math.isfinite(report.loss):
            self.loss += report.loss * report.tokens
            self.tokens += report.tokens
        if report.balance_loss is not None and math.isfinite(report.balance_loss):
            self.balance += report.balance_loss
            self.balance_steps += 1
        self.mtp = self.mtp or [0.0] * len(report.mtp_sums)
        self.mtp_tokens = self.mtp_tokens or [0] * len(report.mtp_sums)
        for depth, (total, count) in enumerate(zip(report.mtp_sums, report.mtp_tokens, strict=True)):
            if math.isfinite(total):
                self.mtp[depth] += total
                self.mtp_tokens[depth] += count
        for layer, routing in report.routing.items():
            new = {"counts": [0] * len(routing.counts), "dropped": 0, "entropy": 0.0, "steps": 0}
            seen = self.routing.setdefault(layer, new)
            seen["counts"] = [a + b for a, b in zip(seen["counts"], routing.counts, strict=True)]
            seen["dropped"] += routing.dropped
            seen["entropy"] += routing.entropy
            seen["steps"] += 1

    @property
    def mtp_loss(self) -> float | None:
        means = [s / n for s, n in zip(self.mtp, self.mtp_tokens, strict=True) if n]
        return sum(means) / len(means) if means else None

    def expert_rows(self, report: StepReport) -> list[dict[str, Any]]:
        """Rows of experts.csv, by layer and expert."""
        rows = []
        for layer, seen in sorted(self.routing.items()):
            counts, total = seen["counts"], sum(seen["counts"])
            bias = report.routing[layer].bias if layer in report.routing else ()
            shared = {
                "step": report.step,
                "layer": layer,
                "max_vio": max(counts) * len(counts) / total - 1 if total else None,
                "entropy": seen["entropy"] / seen["steps"],
                "dead": counts.count(0),
                "dropped": seen["dropped"],
            }
            for expert, count in enumerate(counts):
                load = count / total if total else None
                rows.append({**shared, "expert": expert, "load": load, "bias": bias[expert] if bias else None})
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {**{k: getattr(self, k) for k in self.PLAIN}, "routing": {str(k): v for k, v in self.routing.items()}}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> _Sums:
        sums = cls()
        for key in cls.PLAIN:
            setattr(sums, key, state[key])
        sums.routing = {int(k): v for k, v in state["routing"].items()}
        # tokens of before the break have no seconds here, so they must not count as this session's speed
        sums.all_tokens = 0
        return sums


class TensorBoard:
    """A sink: TensorBoard events in `folder`. Needs the package tensorboard."""

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DependencyError(
                "logging.tensorboard is true, but tensorboard is not installed; pip install tensorboard, or set it "
                "to false"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)

    def metrics(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and value is not None and math.isfinite(value):
                self.writer.add_scalar(name, value, row["step"])

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        for number, (prompt, text) in enumerate(samples):
            self.writer.add_text(f"sample/{number}", f"**{prompt}**{text}", step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A sink: Weights & Biases. Needs the package wandb. A resumed run folder goes on in the same W&B run."""

    def __init__(self, config: WandbConfig, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise DependencyError(
                "logging.wandb is given, but wandb is not installed; pip install wandb, or set logging.wandb to null"
            ) from error
        mark = folder / "wandb-id"
        if not mark.exists():
            write_whole(mark, wandb.util.generate_id().encode())
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or folder.name,
            mode=config.mode,
            dir=str(folder),
            id=mark.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=dict(settings or {}),
        )

    def metrics(self, row: Mapping[str, Any]) -> None:
        values = {k: v for k, v in row.items() if k != "step" and v is not None}
        self.run.log(values, step=row["step"])

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        self.run.log({f"sample/{i}": prompt + text for i, (prompt, text) in enumerate(samples)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Lines:
    """A sink: one line of plain text a row, for logs and pipes."""

    def __init__(self, say: Callable[[str], None], max_steps: int) -> None:
        self.say, self.max_steps = say, max_steps
        self.before: tuple[int, float] | None = None

    def metrics(self, row: Mapping[str, Any]) -> None:
        parts = [f"step {row['step']}/{self.max_steps}"]
        for name, form in (
            ("train_loss", "loss {:.4f}"),
            ("val_loss", "val {:.4f}"),
            ("mtp_loss", "mtp {:.4f}"),
            ("lr", "lr {:.3g}"),
            ("grad_norm", "norm {:.3g}"),
            ("tokens_per_second", "{:,.0f} tok/s"),
            ("mfu", "mfu {:.1%}"),
        ):
            if row.get(name) is not None:
                parts.append(form.format(row[name]))
        now = (row["step"], time.monotonic())
        if self.before is not None and now[0] > self.before[0]:
            left = (now[1] - self.before[1]) / (now[0] - self.before[0]) * (self.max_steps - now[0])
            parts.append(f"{clock(left)} left")
        self.before = now
        self.say("  ".join(parts))

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        for prompt, text in samples:
            self.say("  " + " ".join((prompt + text).split())[:200])

    def close(self) -> None:
        """Nothing is open."""


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressBar(Callback):
    """A bar on a terminal: loss, validation loss, tokens a second, MFU, time left."""

    def __init__(self, flops_per_token: float | None = None, peak_flops: float | None = None) -> None:
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.loss: float | None = None
        self.val: float | None = None
        self.speed: float | None = None

    def on_start(self, step: int, max_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), expand=True)
        self.task = self.bar.add_task("", total=max_steps, completed=step, facts="")
        self.bar.start()

    def on_step(self, report: StepReport) -> None:
        if math.isfinite(report.loss):
            self.loss = report.loss if self.loss is None else 0.9 * self.loss + 0.1 * report.loss
        now = report.tokens / report.seconds if report.seconds > 0 else 0.0
        self.speed = now if self.speed is None else 0.9 * self.speed + 0.1 * now
        self._show(report.step)

    def _show(self, step: int) -> None:
        facts = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        if self.val is not None:
            facts.append(f"val {self.val:.3f}")
        if self.speed is not None:
            facts.append(f"{self.speed:,.0f} tok/s")
            if self.flops_per_token and self.peak_flops:
                facts.append(f"mfu {self.speed * self.flops_per_token / self.peak_flops:.1%}")
        self.bar.update(self.task, completed=step, facts="  ".join(facts))

    def on_evaluation(self, step: int, evaluated: Evaluated) -> None:
        self.val = evaluated.loss
        self._show(step)

    def on_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        from rich.text import Text

        for prompt, text in samples:
            line = Text.assemble((prompt, "bold"), " ".join(text.split())[:300])
            self.bar.console.print(line)

    def on_end(self, step: int) -> None:
        self.bar.stop()


def build_callbacks(
    config: LoggingConfig,
    folder: Path,
    *,
    logging_steps: int,
    max_steps: int,
    after_step: int = 0,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
    on_terminal: bool | None = None,
) -> list[Callback]:
    """The callbacks that a LoggingConfig asks for, tables first. say: prints a line (default: the log); on_terminal:
    default: whether stderr is one."""
    import sys

    from fathom.log import log

    terminal = sys.stderr.isatty() if on_terminal is None else on_terminal
    progress = config.progress if config.progress != "auto" else "bar" if terminal else "lines"
    sinks: list[Sink] = []
    if progress == "lines":
        sinks.append(Lines(say or log.info, max_steps))
    if config.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", after_step))
    if config.wandb is not None:
        sinks.append(Wandb(config.wandb, folder, settings))
    shared = {"flops_per_token": flops_per_token, "peak_flops": peak_flops}
    callbacks: list[Callback] = [Metrics(folder, logging_steps, **shared, sinks=sinks)]
    if config.hardware_seconds:
        callbacks.append(Monitor(folder / "hardware.csv", config.hardware_seconds))
    if progress == "bar":
        callbacks.append(ProgressBar(**shared))
    return callbacks
