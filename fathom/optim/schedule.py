"""Learning-rate schedules: pure functions  step -> factor,  the learning rate being factor x optimizer.lr.

Step n is that of the (n+1)-th update, n = 0 .. N-1, in a run of N = training.max_steps. All but one_cycle warm up the
same way: factor (n + 1) / warmup_steps while n < warmup_steps. A fall ends at step N, one
past the last, so that a final factor of 0 wastes no step. Every function is defined (and constant) past the end
of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fathom.knobs import Knobs, Many

Schedule = Callable[[int], float]


class OneCycleConfig(Knobs):
    """One cycle (Smith & Topin 2019; 1708.07120) as torch.optim.lr_scheduler.OneCycleLR has it: up from max /
    div_factor to max in the first pct_start of the run, then down to max / div_factor / final_div_factor. Momentum is
    left alone."""

    kind: Literal["one_cycle"] = "one_cycle"
    max_lr: float | None = Field(default=None, gt=0)
    """The largest learning rate; null: optimizer.lr."""
    pct_start: float = Field(default=0.02, ge=0, le=1)
    """Share of the run spent rising."""
    div_factor: float = Field(default=25.0, gt=0)
    """max / initial learning rate."""
    final_div_factor: float = Field(default=1000.0, gt=0)
    """initial / final learning rate."""
    anneal_strategy: Literal["cos", "linear"] = "cos"
    """Shape of both ways."""

    def factor(self, step: int, total: int) -> float:
        """1 at the top of the cycle."""
        initial = 1.0 / self.div_factor
        final = initial / self.final_div_factor
        top, last = self.pct_start * total - 1, total - 1
        step = min(step, last)
        if step <= top:
            return self._between(initial, 1.0, step / top if top > 0 else 1.0)
        return self._between(1.0, final, (step - top) / (last - top))

    def _between(self, start: float, end: float, share: float) -> float:
        if self.anneal_strategy == "linear":
            return (end - start) * share + start
        return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * share))


class _WarmUp(Knobs):
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise from 0."""

    def factor(self, step: int, total: int) -> float:
        """Warm-up, then `after` on the share of the rest that is over: 0 at its first step, 1 just after the last."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        rest = total - self.warmup_steps
        return self.after(min(1.0, (step - self.warmup_steps) / rest) if rest > 0 else 1.0, step, total)

    def after(self, share: float, step: int, total: int) -> float:
        """The factor when the warm-up is over; 1 unless a schedule has its own."""
        return 1.0


class CosineConfig(_WarmUp):
    """Half a cosine from 1 to final_factor (Loshchilov & Hutter 2017; 1608.03983)."""

    kind: Literal["cosine"]
    final_factor: float = Field(default=0.1, ge=0, le=1)
    """The factor just after the last step."""

    def after(self, share: float, step: int, total: int) -> float:
        return self.final_factor + (1 - self.final_factor) / 2 * (1 + math.cos(math.pi * share))


class LinearConfig(_WarmUp):
    """A straight line from 1 to final_factor."""

    kind: Literal["linear"]
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """The factor just after the last step."""

    def after(self, share: float, step: int, total: int) -> float:
        return 1 + (self.final_factor - 1) * share


class ConstantConfig(_WarmUp):
    """1 after the warm-up."""

    kind: Literal["constant"]


class WSDConfig(_WarmUp):
    """Warm-up, stable, decay (Hu et al. 2024; 2404.06395): 1 until the last decay_fraction of the run, then down to
    final_factor; the shape is a line, half a cosine, or 1 - sqrt (Haegele et al. 2024; 2405.18392)."""

    kind: Literal["wsd"]
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the run spent falling."""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """How it falls."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """The factor just after the last step."""

    def after(self, share: float, step: int, total: int) -> float:
        start = max(total * (1 - self.decay_fraction), self.warmup_steps)
        if step <= start or start >= total:
            return 1.0
        down = min(1.0, (step - start) / (total - start))
        left = {"linear": 1 - down, "cosine": (1 + math.cos(math.pi * down)) / 2, "sqrt": 1 - math.sqrt(down)}[
            self.shape
        ]
        return self.final_factor + (1 - self.final_factor) * left


class MultiStepConfig(_WarmUp):
    """Multiplied by gamma at every milestone; the defaults are DeepSeek-V2-Lite's."""

    kind: Literal["multi_step"]
    milestones: Many[float] = (0.8, 0.9)
    """Shares of the run, rising."""
    gamma: float = Field(default=0.316, gt=0, le=1)
    """The factor at each."""

    @model_validator(mode="after")
    def _rising(self) -> MultiStepConfig:
        if list(self.milestones) != sorted(set(self.milestones)) or any(not 0 < m < 1 for m in self.milestones):
            raise ValueError(
                f"milestones are {list(self.milestones)}; give shares of the run between 0 and 1, each larger than "
                f"the one before"
            )
        return self

    def after(self, share: float, step: int, total: int) -> float:
        return self.gamma ** sum(step >= m * total for m in self.milestones)


SchedulerConfig = Annotated[
    OneCycleConfig | CosineConfig | WSDConfig | LinearConfig | ConstantConfig | MultiStepConfig,
    Field(discriminator="kind"),
]


def build_schedule(config: SchedulerConfig, total_steps: int, lr: float) -> Schedule:
    """step -> factor of the optimizer's learning rate `lr`; a schedule with a max_lr of its own is scaled to that."""
    scale = 1.0
    if isinstance(config, OneCycleConfig) and config.max_lr is not None:
        scale = config.max_lr / lr
    return lambda step: scale * config.factor(step, total_steps)
