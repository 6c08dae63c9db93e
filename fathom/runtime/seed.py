"""Random numbers: named sub-streams of one seed, and the generators' state as tensors.

`stream(seed, "data", 3)` is the first 63 bits of sha256("seed/data/3"): streams of different names do not touch each
other, so that a new user of chance changes nobody else's numbers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, *names: str | int) -> int:
    """The seed of a named sub-stream, in [0, 2^63)."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of a named sub-stream."""
    return torch.Generator(device=device).manual_seed(stream(seed, *names))


def seed_everything(seed: int, *names: str | int) -> None:
    """Seed the process's own generators (torch on every device, Python, numpy) from a named sub-stream."""
    value = stream(seed, *names)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % (1 << 32))  # noqa: NPY002 - libraries that use the old global generator are meant


def capture() -> dict[str, Tensor]:
    """The state of the process's generators, as tensors that safetensors can hold."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = _numpy_state()
    if version != 3 or kind != "MT19937":
        raise RuntimeError(f"unknown generator state: Python {version}, numpy {kind}")
    state = {
        "torch.cpu": torch.get_rng_state(),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.words": torch.from_numpy(keys.astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["torch.cuda"] = torch.cuda.get_rng_state()
    return state


def _numpy_state() -> tuple[str, Any, int, int, float]:
    return np.random.get_state()  # type: ignore[return-value]  # noqa: NPY002


def restore(state: Mapping[str, Tensor]) -> None:
    """Bring the generators back to a captured state. A CUDA state is passed over on a machine without CUDA."""
    torch.set_rng_state(state["torch.cpu"])
    gauss = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python.words"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy.rest"].tolist()
    words = state["numpy.words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, state["numpy.gauss"].item()))  # noqa: NPY002
    if "torch.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["torch.cuda"])
