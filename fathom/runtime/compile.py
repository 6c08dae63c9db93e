"""torch.compile as a switch, with one clear message where it cannot work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from fathom.errors import DependencyError


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`torch.compile(function)`. On CPU a C++ compiler must be there: DependencyError says so before the first step,
    not in it."""
    if device.type == "cpu":
        wanted = os.environ.get("CXX")
        if not any(shutil.which(c) for c in ([wanted] if wanted else ["g++", "clang++", "c++", "cl"])):
            raise DependencyError(
                "hardware.compile is true, but no C++ compiler was found; install g++ (Debian: apt-get install g++), "
                "set CXX, or use hardware.compile: false"
            )
    # static shapes: dynamic ones make inductor fail on MoE blocks (torch 2.13), and rows rarely change length
    return torch.compile(function, dynamic=False)
