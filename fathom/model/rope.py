"""Rotary position embedding and YaRN.                 Su et al. 2021; Peng et al. 2023; DeepSeek-V2 report 2.1.3, 3.1.4

    (x_2i, x_2i+1) at position p is turned by the angle p * f_i,     f_i = theta^(-2i / R)

Pairs are neighbours (interleaved), as in DeepSeek's models. YaRN stretches a context of L tokens by a factor s:
slow frequencies are divided by s, fast ones stay, those between are mixed along a ramp,

    f_i <- f_i / s * (1 - g_i) + f_i * g_i,   g_i = 1 - clamp((i - low) / (high - low), 0, 1)
    low, high = R ln(L / (2 pi beta)) / (2 ln theta)  at beta = beta_fast (floored), beta_slow (ceiled)

and the softmax scale is multiplied by mscale(s, mscale_all_dim)^2, with mscale(s, m) = 0.1 m ln(s) + 1.

Angles are computed in float32 or finer from integers at each forward pass, and nothing is kept in a buffer: a model
cast to bfloat16 keeps exact angles.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fathom.knobs import Knobs
from fathom.model.native import kernels


class YarnConfig(Knobs):
    """YaRN context extension (section 3.1.4 of the DeepSeek-V2 report)."""

    rope_type: Literal["yarn"] = "yarn"
    """The only scaling that DeepSeek's models use."""
    factor: float = Field(default=1.0, ge=1.0)
    """s: by how much the context is stretched."""
    original_max_position_embeddings: int = Field(default=4096, gt=0)
    """L: the context length before stretching, in tokens."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Frequencies that turn more often than this within L stay as they are."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Frequencies that turn less often than this within L are divided by the factor."""
    mscale: float = Field(default=1.0, ge=0)
    """m in the length of the rotary vectors: mscale(s, mscale) / mscale(s, mscale_all_dim)."""
    mscale_all_dim: float = Field(default=1.0, ge=0)
    """m in the softmax scale: mscale(s, mscale_all_dim)^2."""


def mscale(factor: float, m: float) -> float:
    """mscale(s, m) = 0.1 m ln(s) + 1, and 1 for s <= 1."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def softmax_scale(head_dim: int, scaling: YarnConfig | None) -> float:
    """head_dim^-1/2, times mscale(s, mscale_all_dim)^2 under YaRN."""
    scale = head_dim**-0.5
    if scaling is not None and scaling.mscale_all_dim:
        scale *= mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(rotary_dim: int, theta: float, scaling: YarnConfig | None, device: torch.device) -> Tensor:
    """f (R/2), float32, as the head of this file has it."""
    index = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).float()
    freq = 1.0 / (theta ** (index / rotary_dim))
    if scaling is None or scaling.factor == 1.0:
        return freq

    def turning(beta: float) -> float:
        length = scaling.original_max_position_embeddings
        return rotary_dim * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(theta))

    high: float
    low = max(math.floor(turning(scaling.beta_fast)), 0)
    high = min(math.ceil(turning(scaling.beta_slow)), rotary_dim - 1)
    high = high + 0.001 if high == low else high
    ramp = ((torch.arange(rotary_dim // 2, device=device).float() - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return freq / scaling.factor * (1 - keep) + freq * keep


class Rope:
    """cos and sin for given positions, made once a forward pass and shared by all layers.

    cos, sin: (B, T, 1, R/2), float32.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    @classmethod
    def at(cls, positions: Tensor, rotary_dim: int, theta: float, scaling: YarnConfig | None) -> Rope:
        """For positions (B, T), int64."""
        freq = inverse_frequencies(rotary_dim, theta, scaling, positions.device)
        angle = positions.float()[..., None, None] * freq
        length = 1.0
        if scaling is not None:
            length = mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all_dim)
        return cls(angle.cos() * length, angle.sin() * length)

    def turn(self, x: Tensor) -> Tensor:
        """x (B, T, N, R) with every neighbouring pair turned, in the dtype of x."""
        if kernels.serve(x):
            return kernels.turn(x, self.cos, self.sin)
        return self.turn_plain(x)

    def turn_plain(self, x: Tensor) -> Tensor:
        """The formula as it stands: the slow twin of the kernel."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * self.cos - odd * self.sin, even * self.sin + odd * self.cos), dim=-1)
        return turned.flatten(-2).to(x.dtype)
