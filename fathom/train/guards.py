"""Guards: what may stop an update. A step whose loss or gradient is not finite, or far above its recent past, changes
nothing.

float16 gradients are multiplied by a loss scale so that small ones do not vanish. A gradient that is not finite then
usually means a scale too large: the scale is halved and the step skipped, which is no cause for alarm until the scale
is 1.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from fathom.errors import TrainingError
from fathom.knobs import Knobs


class GuardsConfig(Knobs):
    """When a step is skipped, and when the run stops."""

    max_skipped: int = Field(default=10, ge=1)
    """Stop after this many skipped steps in a row (float16 searching for its loss scale is not counted)."""
    spike_factor: float | None = Field(default=None, gt=1)
    """Skip a step whose gradient norm is more than this many times the median of the last spike_window; null: never."""
    spike_window: int = Field(default=50, ge=3)
    """Steps that the median runs over; no step is a spike before it is full."""
    initial_loss_scale: float = Field(default=65536.0, ge=1)
    """float16 only: the loss scale to begin with."""
    scale_growth_interval: int = Field(default=2000, ge=1)
    """float16 only: double the loss scale after this many steps without an overflow."""


@dataclass
class LossScaler:
    """The loss scale s: halved (not below 1) when a gradient overflows, doubled after `interval` good steps, at most
    2^24."""

    scale: float = 1.0
    interval: int = 2000
    good: int = 0
    enabled: bool = True

    def update(self, finite: bool) -> None:
        """Tell the scaler how a step went."""
        if not self.enabled:
            return
        if not finite:
            self.scale, self.good = max(1.0, self.scale / 2), 0
            return
        self.good += 1
        if self.good >= self.interval:
            self.scale, self.good = min(2.0**24, self.scale * 2), 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # a run that goes on in other arithmetic keeps the scaler that this arithmetic wants
        if self.enabled and state.get("enabled", True):
            self.scale, self.good = float(state["scale"]), int(state["good"])


@dataclass
class Guard:
    """Judges every step by its loss and its gradient norm, both plain floats, both without loss scale."""

    config: GuardsConfig
    scaler: LossScaler
    in_a_row: int = 0
    total: int = 0
    norms: deque[float] = field(default_factory=deque)

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """None: take the step. Otherwise why not; raises TrainingError when the run should stop."""
        reason = self._reason(loss, norm)
        searching = reason == "gradient not finite" and self.scaler.enabled and self.scaler.scale > 1
        self.scaler.update(finite=math.isfinite(norm))
        if reason is None:
            self.in_a_row = 0
            self.norms.append(norm)
            if len(self.norms) > self.config.spike_window:
                self.norms.popleft()
            return None
        self.total += 1
        if searching:
            return "overflow"
        self.in_a_row += 1
        if self.in_a_row >= self.config.max_skipped:
            raise TrainingError(
                f"step {step}: {reason}, {self.in_a_row} skipped steps in a row (loss {loss:g}, gradient norm "
                f"{norm:g}). "
                "The weights are those of the last good step, and the last checkpoint stands. Lower optimizer.lr, use "
                "hardware.precision: bfloat16 or float32, set hardware.gradient_clip, or raise "
                "training.guards.max_skipped"
            )
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "loss not finite"
        if not math.isfinite(norm):
            return "gradient not finite"
        if self.config.spike_factor is not None and len(self.norms) >= self.config.spike_window:
            median = sorted(self.norms)[len(self.norms) // 2]
            if norm > self.config.spike_factor * median:
                return "gradient spike"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "in_a_row": self.in_a_row,
            "total": self.total,
            "norms": list(self.norms),
            "scaler": {**self.scaler.state_dict(), "enabled": self.scaler.enabled},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.total = int(state["in_a_row"]), int(state["total"])
        self.norms = deque(state["norms"])
        self.scaler.load_state_dict(state["scaler"])
