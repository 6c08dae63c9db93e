"""Which dtype matrix products run in, and which one sums and exponentials need."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype if it is on (hand-written operators must ask, it does not cast for them), else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def widen(x: Tensor) -> Tensor:
    """x in float32; float64 stays, so that gradients can be checked by finite differences."""
    return x if x.dtype == torch.float64 else x.float()
