"""int8 weights, for generating text on a CPU: a quarter of the memory, and of the time that reading it takes.

    W_nk  ~  s_n q_nk,    s_n = max_k |W_nk| / 127,    q_nk = round(W_nk / s_n)          a scale for each output row

so no weight is off by more than s_n / 2, 0.4 % of the largest of its row. The compiled kernels multiply them with x in
16 bits, of which no number is off by more than 1 / 65,534 of the largest of its row; where there are none, q is
brought to float32 block by block. W_kv_b, which decoding uses by halves and heads, is kept in bfloat16, where no
weight is off by more than 0.4 % of its own size. Norms and routers stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.model.feedforward import swiglu
from fathom.model.linear import Embedding, Linear
from fathom.model.moe.experts import Experts
from fathom.model.native import kernels
from fathom.model.transformer import Transformer

LEVELS = 127
BLOCK = 1 << 21  # weights that stand in float32 at once: 8 MB
BY_HEADS = "kv_b_proj"


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (..., N, K) -> q (..., N, K) int8, s (..., N) float32."""
    wide = weight.float()
    scales = wide.abs().amax(-1) / LEVELS
    q = (wide / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().to(torch.int8)
    return q, scales


def rebuilt(q: Tensor, scales: Tensor) -> Tensor:
    """q (..., N, K), s (..., N) -> float32 (..., N, K)."""
    return q.float().mul_(scales.unsqueeze(-1))


def product_int8(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """x (..., K), q (N, K) int8, s (N) -> x W^T (..., N), in the dtype of x."""
    if x.numel() and kernels.serve(x):
        return kernels.product(x, q, scales)
    return by_blocks(x.float(), q, scales).to(x.dtype)


def by_blocks(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """x (..., K) float32 -> x W^T (..., N) float32, with never more than a block of q in float32."""
    parts = [F.linear(x, block.float()) for block in q.split(max(1, BLOCK // q.shape[1]))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).mul_(scales)


# --- modules ----------------------------------------------------------------


class Fixed(nn.Module):
    """A part whose weights are no parameters: they cannot be trained, cast, moved or saved."""

    def train(self, mode: bool = True) -> Fixed:
        """UserError if mode."""
        if mode:
            raise UserError("A model with int8 weights cannot be trained; load it again without int8.")
        return super().train(False)

    def _save_to_state_dict(self, *_: Any) -> None:
        raise UserError(
            "A model with int8 weights cannot be saved or exported: they are made anew each time it is loaded. "
            "Load it again without int8."
        )


class Int8(Fixed):
    """A weight (N, K) in int8."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.kept = quantized(weight)
        self._like = torch.full((1, 1), torch.nan, dtype=weight.dtype)
        self.eval()

    @property
    def weight(self) -> Tensor:
        """Of the shape, dtype and device that a weight would have here. All NaN: for its numbers ask `dense`."""
        return self._like.expand(self.kept[0].shape)

    def dense(self) -> Tensor:
        """The weight rebuilt, in the dtype it had."""
        return rebuilt(*self.kept).to(self._like.dtype)

    def extra_repr(self) -> str:
        return f"int8, {tuple(self.kept[0].shape)}"


class Int8Linear(Int8):
    """x (..., K) -> y (..., N)."""

    def forward(self, x: Tensor) -> Tensor:
        return product_int8(x, *self.kept)

    def takes(self, x: Tensor, rows: int) -> bool:
        """As `Linear.takes`: always, where there are kernels."""
        return rows > 0 and kernels.serve(x)


class Int8Embedding(Int8):
    """tokens (...) int64 -> rows (..., D); the output head too, where the two are tied."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, tokens: Tensor) -> Tensor:
        place = tokens.flatten()
        rows = rebuilt(*(part.index_select(0, place) for part in self.kept))
        return rows.to(self._like.dtype).view(*tokens.shape, -1)

    def as_head(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., V)."""
        return product_int8(x, *self.kept)


class Int8Experts(Fixed):
    """`Experts` in int8: rows [gate ; up] (2 I, D) and down (D, I) of each expert, with a scale for each row."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.kept = quantized(experts.gate_up_proj), quantized(experts.down_proj)
        self.eval()

    def takes(self, x: Tensor, k: int) -> bool:
        """As `Experts.takes`: always, where there are kernels."""
        return x.numel() > 0 and kernels.serve(x)

    def forward(self, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """As `Experts`, one after the other."""
        lengths, parts = counts.tolist(), []
        for e, (rows, share) in enumerate(zip(x.float().split(lengths), weights.split(lengths), strict=True)):
            gate_up, down = (tuple(part[e] for part in kept) for kept in self.kept)
            inner = swiglu(*by_blocks(rows, *gate_up).chunk(2, dim=-1)) * share.unsqueeze(-1)
            parts.append(by_blocks(inner, *down))
        return torch.cat(parts).to(x.dtype)


# --- a whole model ----------------------------------------------------------------


@torch.no_grad()
def quantize_int8(model: Transformer) -> Transformer:
    """Replace the weights of a model by int8, in place, and free the old ones; the same model.

    UserError: it is in int8 already, in training mode, or not on a CPU.
    """
    if isinstance(model.embed_tokens, Int8):
        raise UserError("The model has int8 weights already.")
    if model.training:
        raise UserError("int8 weights are for generating text, and the model is in training mode; call model.eval().")
    device = model.embed_tokens.weight.device
    if device.type != "cpu":
        raise UserError(f"int8 weights are for a CPU, and the model is on {device}; load it with device cpu.")
    _replace(model)
    return model.requires_grad_(False)


def _replace(parent: nn.Module) -> None:
    """Everything below a module that has an int8 form; a part is freed before the next is begun."""
    for name, part in list(parent.named_children()):
        if isinstance(part, Embedding):
            setattr(parent, name, Int8Embedding(part.weight))
        elif isinstance(part, Experts):
            setattr(parent, name, Int8Experts(part))
        elif not isinstance(part, Linear):
            _replace(part)
        elif name == BY_HEADS:
            part.to(torch.bfloat16)
        else:
            setattr(parent, name, Int8Linear(part.weight))
