"""The routed experts: E SwiGLU networks held in two tensors.                       DeepSeekMoE (2401.06066), section 3

    y_e = W_down,e (g silu(W_gate,e x) * W_up,e x)       gate_up_proj (E, 2 I, D), rows [gate ; up]; down_proj (E, D, I)

The router's weight g is applied before the last product and not after it, which is the same function (the product is
linear): the row is narrower there, and the experts' outputs need not be kept for the backward pass.

`grouped_mm` is one call for all experts over sorted rows; `eager` is the plain loop, its slow twin. Both take rows
sorted by expert and are the same function. `auto` is grouped where PyTorch's kernel can run (row sizes of a multiple
of 16 bytes, float32 or bfloat16), else the loop.

Without gradients on a CPU the compiled kernel takes tokens as they are (`native/kernels.py`), up to PER_EXPERT rows for
each expert: sorting and copying them costs more than a library's faster products save.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.model.feedforward import weighted_swiglu
from fathom.model.linear import arithmetic
from fathom.model.native import kernels
from fathom.model.native.kernels import Kept

PER_EXPERT = 128
ExpertsImplementation = Literal["auto", "grouped_mm", "eager"]


class Experts(nn.Module):
    """x (n, D) sorted by expert, weights (n) float32, counts (E) int64 -> (n, D), weighted."""

    def __init__(self, hidden_size: int, width: int, n_experts: int, implementation: ExpertsImplementation) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_experts, hidden_size, width))
        self.implementation = implementation

    def forward(self, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        dtype = arithmetic(x, self.down_proj)
        gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        run = experts_grouped if self._grouped(dtype, x.device) else experts_loop
        return run(x.to(dtype), weights, counts, gate_up, down).to(x.dtype if kernels.serve(x) else dtype)

    @property
    def kept(self) -> tuple[Kept, Kept]:
        """gate and up of each, and down, as the kernels take them."""
        return (self.gate_up_proj, None), (self.down_proj, None)

    def takes(self, x: Tensor, k: int) -> bool:
        """Whether the kernels are the faster way for tokens x (n, D) with K experts each; they need not be sorted
        then."""
        n = x.shape[0]
        return 0 < n * k <= PER_EXPERT * len(self.down_proj) and kernels.serve(x) and kernels.alike(*self.kept)

    @property
    def loops(self) -> bool:
        """Whether the plain loop is what runs, with the weights as they are."""
        return not self._grouped(self.down_proj.dtype, self.down_proj.device)

    def _grouped(self, dtype: torch.dtype, device: torch.device) -> bool:
        if self.implementation != "auto":
            return self.implementation == "grouped_mm"
        bytes_each = torch.empty(0, dtype=dtype).element_size()
        sizes = (self.down_proj.shape[1], self.down_proj.shape[2])
        fits = all(size * bytes_each % 16 == 0 for size in sizes)
        # float16 has no fast matrix product on most CPUs, float64 none here at all
        known = dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else dtype == torch.bfloat16
        return fits and known and not torch.compiler.is_compiling()


def experts_grouped(x: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Two grouped matrix products over rows sorted by expert."""
    ends = counts.cumsum(0).to(torch.int32)
    inner = weighted_swiglu(F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends), weights)
    return F.grouped_mm(inner, down.transpose(1, 2), offs=ends)


def experts_loop(x: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert after the other. `split` and `unbind`, since indexing `w[e]` under autograd makes a full-size
    gradient each time."""
    lengths = counts.tolist()
    parts = zip(x.split(lengths), weights.split(lengths), gate_up.unbind(0), down.unbind(0), strict=True)
    return torch.cat([F.linear(weighted_swiglu(F.linear(x_e, w_in), g_e), w_out) for x_e, g_e, w_in, w_out in parts])
