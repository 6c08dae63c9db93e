"""The routed experts: E SwiGLU networks held in two tensors.                       DeepSeekMoE (2401.06066), section 3

    y_e = W_down,e (silu(W_gate,e x) * W_up,e x)            gate_up_proj (E, 2 I, D), rows [gate ; up]; down_proj (E, D, I)

`grouped_mm` is one call for all experts over sorted rows; `eager` is the plain loop, its slow twin. Both take rows sorted by
expert and are the same function. `auto` is grouped where PyTorch's kernel can run (row sizes of a multiple of 16 bytes), else the loop.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.model.feedforward import swiglu

ExpertsImplementation = Literal["auto", "grouped_mm", "eager"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products here: autocast's if it is on (grouped_mm does not ask it), else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Experts(nn.Module):
    """x (rows, D) sorted by expert, counts (E) int64 -> (rows, D)."""

    def __init__(self, hidden_size: int, width: int, n_experts: int, implementation: ExpertsImplementation) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_experts, hidden_size, width))
        self.implementation = implementation

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        run = experts_grouped if self._grouped(dtype, x.device) else experts_loop
        return run(x.to(dtype), counts, gate_up, down)

    def _grouped(self, dtype: torch.dtype, device: torch.device) -> bool:
        if self.implementation != "auto":
            return self.implementation == "grouped_mm"
        bytes_each = torch.empty(0, dtype=dtype).element_size()
        fits = all(size * bytes_each % 16 == 0 for size in (self.gate_up_proj.shape[1] // 2, self.gate_up_proj.shape[2]))
        # float16 has no fast matrix product on most CPUs, float64 none here at all
        known = dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else dtype == torch.bfloat16
        return fits and known and not torch.compiler.is_compiling()


def experts_grouped(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Two grouped matrix products over rows sorted by expert."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(swiglu(gate, up).contiguous(), down.transpose(1, 2), offs=ends)


def experts_loop(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert after the other. `split` and `unbind`, since indexing `w[e]` under autograd makes a full-size gradient each time."""
    shares = x.split(counts.tolist())
    outputs = []
    for share, w_in, w_out in zip(shares, gate_up.unbind(0), down.unbind(0), strict=True):
        gate, up = F.linear(share, w_in).chunk(2, dim=-1)
        outputs.append(F.linear(swiglu(gate, up), w_out))
    return torch.cat(outputs)
