"""Facts that the trainer hands out, and what may listen. A callback gets facts, never the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from fathom.batch import Batch


class Losses(Protocol):
    """What an objective gives for one micro-batch; see `model/loss.py`, whose Losses is one. total () carries the
    gradient."""

    @property
    def total(self) -> Tensor: ...
    @property
    def next_token(self) -> Tensor: ...
    @property
    def tokens(self) -> Tensor | int: ...
    @property
    def mtp(self) -> Tensor: ...
    @property
    def mtp_tokens(self) -> Tensor: ...
    @property
    def balance(self) -> Tensor: ...
    @property
    def routing(self) -> Sequence[Any]: ...


class Objective(Protocol):
    """token_count: targets of the whole optimizer step, over micro-batches and ranks; batch_share: this micro-batch's
    (and rank's) share of the step's rows; progress: share of the run that is over, in [0, 1)."""

    def __call__(
        self, model: nn.Module, batch: Batch, *, token_count: int, batch_share: float, progress: float
    ) -> Losses: ...


class Loader(Protocol):
    """Micro-batches of this rank, without end. `state_dict` speaks of batches handed out, not of those fetched ahead.
    A loader may have `epoch: float`, the passes over the data so far."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Evaluated(Protocol):
    """What an evaluation gives: nats a token and, if bytes are known, bits per byte."""

    @property
    def loss(self) -> float: ...
    @property
    def bits_per_byte(self) -> float | None: ...


@dataclass(frozen=True)
class LayerRouting:
    """One MoE layer over one optimizer step (all micro-batches and ranks).

    counts   assignments to each expert, before drops;   dropped  assignments beyond capacity
    entropy  of the mean gate distribution, in nats, mean over micro-batches and ranks
    bias     selection bias of each expert after the step, empty where there is none
    """

    counts: tuple[int, ...]
    dropped: int
    entropy: float
    bias: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Losses are nats a token over this step.

    step        number of this step, from 1;   progress  step / max_steps
    tokens      targets of this step;          tokens_seen  of the run so far
    loss, mtp_loss (mean over depths; None without MTP), balance_loss (None without MoE)
    grad_norm   before clipping, loss scale taken out
    skipped     why the weights did not move, or None
    seconds     wall-clock of this step, evaluation and saving not included; elapsed  of the run, all sessions,
                everything included
    routing     by layer number
    """

    step: int
    max_steps: int
    tokens: int
    tokens_seen: int
    epoch: float | None
    loss: float
    mtp_tokens: tuple[int, ...]
    mtp_sums: tuple[float, ...]
    balance_loss: float | None
    lr: float
    grad_norm: float
    loss_scale: float
    skipped: str | None
    seconds: float
    elapsed: float
    routing: Mapping[int, LayerRouting] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        return self.step / self.max_steps

    @property
    def mtp_loss(self) -> float | None:
        """Mean over depths of nats a target."""
        pairs = [(s, n) for s, n in zip(self.mtp_sums, self.mtp_tokens, strict=True) if n]
        return sum(s / n for s, n in pairs) / len(pairs) if pairs else None


class Callback:
    """Listens to a run; every method may be left out. `state_dict` goes into checkpoints, so that a resumed run's
    tables go on as if nothing had happened. Only rank 0 has callbacks."""

    def on_start(self, step: int, max_steps: int) -> None:
        """The run begins, or goes on after `step` steps."""

    def on_step(self, report: StepReport) -> None:
        """A step was done."""

    def on_evaluation(self, step: int, evaluated: Evaluated) -> None:
        """The model was evaluated after `step` steps. Comes after on_step of the same step."""

    def on_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """(prompt, generated text) after `step` steps."""

    def on_step_end(self, step: int) -> None:
        """Everything that belongs to a step is known, and its checkpoint not yet written."""

    def on_event(self, step: int, kind: str, **facts: Any) -> None:
        """Something that is not in a table: a skipped step, a checkpoint, a signal."""

    def on_end(self, step: int) -> None:
        """The run ends or is left."""

    def flush(self) -> None:
        """Bring what was written to the disk; called before a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
