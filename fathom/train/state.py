"""The trainer's own numbers: everything that a resumed run must know and that is neither a weight nor an optimizer's
moment."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from fathom.errors import CheckpointError


@dataclass
class TrainState:
    """step: optimizer steps begun and ended (skipped ones too); tokens: targets seen; seconds: wall-clock of all
    sessions; val_loss: of the evaluation at this very step, or None; best_val_loss, best_step: the lowest so far."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None

    def evaluated(self, loss: float) -> bool:
        """Take note of a validation loss; whether it is the lowest so far."""
        self.val_loss = loss
        if self.best_val_loss is None or loss < self.best_val_loss:
            self.best_val_loss, self.best_step = loss, self.step
            return True
        return False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TrainState:
        known = {f.name for f in fields(TrainState)}
        if set(values) != known:
            raise CheckpointError(
                f"the checkpoint's trainer.json has {sorted(values)} where {sorted(known)} is meant; it is of "
                f"another version"
            )
        return TrainState(**values)
