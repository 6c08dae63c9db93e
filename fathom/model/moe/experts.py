"""The routed experts: E SwiGLU networks held in two tensors.                       DeepSeekMoE (2401.06066), section 3

    y_e = W_down,e (g silu(W_gate,e x) * W_up,e x)       gate_up_proj (E, 2 I, D), rows [gate ; up]; down_proj (E, D, I)

The router's weight g is applied before the last product and not after it, which is the same function (the product is
linear): the row is narrower there, and the experts' outputs need not be kept for the backward pass.

`grouped_mm` is one call for all experts over sorted rows; `eager` is the plain loop, its slow twin. Both take rows
sorted by expert and are the same function. `auto` is grouped where PyTorch's kernel can run (row sizes of a multiple
of 16 bytes, float32 or bfloat16), else the loop.

Generating text, there are so few tokens that sorting them costs more than their products. `visit` takes them unsorted
and goes only to the experts that were chosen. Where all experts together are small, even that is more to do than to
ask every expert about every token (`ask_all`), and the work no longer depends on what was chosen. In microseconds, two
cores without AVX-512 and one thread, 8 experts of 64, 2 a token, hidden 96:

    tokens      1     2     4     8    16    32    64
    sorted    409   451   486   556   564   633   725
    visit     198   387   510   616   696   770
    ask_all   175   185   266   292   356   507   808
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.model.feedforward import weighted_swiglu
from fathom.model.linear import is_plain, product, turns
from fathom.model.precision import compute_dtype, widen

ExpertsImplementation = Literal["auto", "grouped_mm", "eager"]

SMALL = 1 << 18  # elements of all experts together, up to which a few tokens ask all of them ...
ASKED = 1 << 22  # ... as long as there are no more tokens times elements


class Experts(nn.Module):
    """x (n, D) sorted by expert, weights (n) float32, counts (E) int64 -> (n, D), weighted."""

    def __init__(self, hidden_size: int, width: int, n_experts: int, implementation: ExpertsImplementation) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_experts, hidden_size, width))
        self.implementation = implementation

    def forward(self, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        run = experts_grouped if self._grouped(dtype, x.device) else experts_loop
        return run(x.to(dtype), weights, counts, gate_up, down)

    def visits(self, x: Tensor) -> bool:
        """Whether `visit` is the faster way for tokens x (n, D)."""
        few = x.shape[0] == 1 or turns(x.shape[0], self.gate_up_proj.numel() // len(self.gate_up_proj))
        return is_plain(x) and (few or self._asks_all(x))

    def _asks_all(self, x: Tensor) -> bool:
        size = self.gate_up_proj.numel() + self.down_proj.numel()
        return size <= SMALL and x.shape[0] * size <= ASKED

    def visit(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (n, D), chosen (n, K) int64, weights (n, K) float32 -> (n, D), a token's K outputs weighted and added."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if self._asks_all(x):
            return ask_all(x, chosen, weights, gate_up, down)
        return visit(x, chosen, weights, lambda e, x: product(x, gate_up[e]), lambda e, x: product(x, down[e]))

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


Product = Callable[[int, Tensor], Tensor]


def visit(x: Tensor, chosen: Tensor, weights: Tensor, enter: Product, leave: Product) -> Tensor:
    """Some tokens: each chosen expert once, with the rows that chose it; as `Experts.visit`.

    enter, leave: products of an expert's rows, (e, (m, D)) -> (m, 2 I) and (e, (m, I)) -> (m, D), in the dtype of x.
    """
    n, k = chosen.shape
    flat = chosen.flatten().tolist()
    if n == 1:  # nothing to sort
        both = torch.cat([enter(e, x) for e in flat])
        inner = weighted_swiglu(widen(both), weights[0]).to(x.dtype).split(1)
        return widen(torch.cat([leave(e, row) for e, row in zip(flat, inner, strict=True)])).sum(0, keepdim=True)
    order = sorted(range(n * k), key=flat.__getitem__)  # the assignment of each sorted row
    runs = [(e, len(list(same))) for e, same in groupby(flat[i] for i in order)]
    lengths = [length for _, length in runs]
    place = torch.tensor(order)
    rows = x.index_select(0, place.div(k, rounding_mode="floor")).split(lengths)
    both = torch.cat([enter(e, row) for (e, _), row in zip(runs, rows, strict=True)])
    inner = weighted_swiglu(widen(both), weights.flatten().index_select(0, place)).to(x.dtype).split(lengths)
    out = widen(torch.cat([leave(e, row) for (e, _), row in zip(runs, inner, strict=True)]))
    return out.index_select(0, place.argsort()).view(n, k, -1).sum(1)


def ask_all(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """All experts for all tokens, weighed 0 where they were not chosen; as `Experts.visit`."""
    n, experts = len(x), len(gate_up)
    share = weights.new_zeros(n, experts).scatter_(1, chosen, weights).flatten()
    both = F.linear(x, gate_up.flatten(0, 1)).view(n * experts, -1)
    inner = weighted_swiglu(both, share).view(n, experts, -1)
    return torch.bmm(inner.transpose(0, 1), down.transpose(1, 2)).sum(0)
