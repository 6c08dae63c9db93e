"""int8 weights, for generating text on a CPU: a quarter of the memory, and of the time that reading it takes.

    W_nk  ~  s_n q_nk,    s_n = max_k |W_nk| / 127,    q_nk = round(W_nk / s_n)          a scale for each output row

so no weight is off by more than s_n / 2, 0.4 % of the largest of its row. What is multiplied with them:

    layers    x in bfloat16, sums in float32, y in bfloat16 (PyTorch's `_weight_int8pack_mm`)
    head      x in 13 bits, sums exact, y in float32 (FBGEMM); without FBGEMM all in float32

Many rows are multiplied with q in float32, block by block, but rounded as few are, so that a token does not depend on
how many others are read with it. Norms, routers and W_kv_b, which decoding uses by halves and heads, stay as they are.
Embedding and head keep their integers twice: as rows to look up, and packed for the product.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.model.feedforward import FeedForward, swiglu
from fathom.model.linear import Embedding, Linear
from fathom.model.moe.experts import Experts, visit
from fathom.model.transformer import Transformer

LEVELS = 127
FEW = 8  # rows that are multiplied with int8 as it is ...
FEW_AT_HEAD = 32  # ... and packed
VECTOR = 32  # what `_weight_int8pack_mm` needs K to be a multiple of: it reads whole vectors, past the end if need be
BLOCK = 1 << 21  # weights that stand in float32 at once: 8 MB
KEPT = "kv_b_proj"


def quantized(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W (..., N, K) -> q (..., N, K) int8, s (..., N). The scale is rounded first, so that q makes up for it."""
    wide = weight.float()
    scale = wide.abs().amax(-1) / LEVELS
    narrow = scale.to(scale_dtype)
    narrow = torch.where(narrow.float() < scale, torch.nextafter(narrow, torch.full_like(narrow, torch.inf)), narrow)
    integers = wide / narrow.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return integers.round_().to(torch.int8), narrow


def rebuilt(q: Tensor, scale: Tensor) -> Tensor:
    """q (..., N, K), s (..., N) -> float32 (..., N, K)."""
    return q.float().mul_(scale.float().unsqueeze(-1))


def product_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (m, K) bfloat16, q (N, K) int8, s (N) bfloat16 -> x W^T (m, N) bfloat16."""
    if x.shape[0] <= FEW and x.shape[1] % VECTOR == 0:
        return torch._weight_int8pack_mm(x.contiguous(), q, scale)
    return by_blocks(x.float(), q, scale).to(x.dtype)


def by_blocks(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (m, K) float32 -> x W^T (m, N) float32, with never more than a block of q in float32."""
    parts = [F.linear(x, block.float()) for block in q.split(max(1, BLOCK // q.shape[1]))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).mul_(scale.float())


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

    def __init__(self, weight: Tensor, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.scale = quantized(weight, scale_dtype)
        self._like = torch.full((1, 1), torch.nan, dtype=weight.dtype)
        self.eval()

    @property
    def weight(self) -> Tensor:
        """Of the shape, dtype and device that a weight would have here. All NaN: for its numbers ask `dense`."""
        return self._like.expand(self.q.shape)

    def dense(self) -> Tensor:
        """The weight rebuilt, in the dtype it had."""
        return rebuilt(self.q, self.scale).to(self._like.dtype)

    def extra_repr(self) -> str:
        return f"int8, {tuple(self.q.shape)}"


class Int8Linear(Int8):
    """x (..., K) -> y (..., N)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y = product_int8(x.reshape(-1, x.shape[-1]).bfloat16(), self.q, self.scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class Int8Head(Int8):
    """The output head: hidden (..., D) -> logits (..., V)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, torch.float32)
        self._packed = Packed.of(self.q)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()
        if self._packed is not None and flat.shape[0] <= FEW_AT_HEAD:
            y = self._packed.product(flat).mul_(self.scale)
        else:
            y = by_blocks(flat, self.q, self.scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class Int8Embedding(Int8Head):
    """tokens (...) int64 -> rows (..., D); the output head too, where the two are tied."""

    def __init__(self, weight: Tensor, tied: bool) -> None:
        Int8.__init__(self, weight, torch.float32)
        self._packed = Packed.of(self.q) if tied else None
        self.num_embeddings, self.embedding_dim = self.q.shape

    def forward(self, tokens: Tensor) -> Tensor:
        place = tokens.flatten()
        rows = rebuilt(self.q.index_select(0, place), self.scale.index_select(0, place))
        return rows.to(self._like.dtype).view(*tokens.shape, -1)

    def as_head(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., V)."""
        return Int8Head.forward(self, x)


class Int8FeedForward(nn.Module):
    """`FeedForward` in int8, gate and up in one product."""

    def __init__(self, network: FeedForward) -> None:
        super().__init__()
        self.gate_up_proj = Int8Linear(torch.cat((network.gate_proj.weight, network.up_proj.weight)))
        self.down_proj = Int8Linear(network.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*self.gate_up_proj(x).chunk(2, dim=-1)))


class Int8Experts(Fixed):
    """`Experts` in int8: rows [gate ; up] (2 I, D) and down (D, I) of each expert, with a scale for each row."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.enter, self.leave = _unbound(experts.gate_up_proj), _unbound(experts.down_proj)

    def visits(self, x: Tensor) -> bool:
        """Always: tokens need not be sorted beforehand."""
        return True

    def visit(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As `Experts.visit`."""
        enter, leave = self.enter, self.leave
        narrow = x.bfloat16()
        out = visit(
            narrow, chosen, weights, lambda e, x: product_int8(x, *enter[e]), lambda e, x: product_int8(x, *leave[e])
        )
        return out.to(x.dtype)


def _unbound(weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(E, N, K) -> E of (N, K) int8 and (N) bfloat16."""
    return list(zip(*(part.unbind(0) for part in quantized(weight, torch.bfloat16)), strict=True))


class Packed:
    """An int8 matrix q (N, K) as FBGEMM wants it, for products with float32.

    FBGEMM rounds x to 8 bits, from the smallest to the largest number it is given. So it is given whole numbers: the
    first digit of x to the base 126, and the second, each between -63 and 63, and beside them -64 and 191, which
    multiply zeros and make the step 1. So few bits also keep its sums of two products within 16 bits on every
    processor. Rows do not touch each other, and x is right to 1 / 15,876 of the largest of its row.
    """

    def __init__(self, q: Tensor) -> None:
        wide = F.pad(q, (0, 4))
        self._packed = torch.fbgemm_pack_quantized_matrix(wide)
        self._sums = q.sum(-1, dtype=torch.int32)
        self._bias = torch.zeros(q.shape[0])
        self._shape = wide.new_empty(1, 1).expand(wide.shape)  # FBGEMM asks for the matrix itself, and reads its shape
        self._edges = torch.tensor([[-64.0, 191.0, 0.0, 0.0]])

    @classmethod
    def of(cls, q: Tensor) -> Packed | None:
        """None where FBGEMM is not."""
        with warnings.catch_warnings():  # PyTorch means to drop these operators one day
            warnings.simplefilter("ignore")
            try:
                made = cls(q)
                made.product(torch.ones(1, q.shape[1]))
            except (AttributeError, RuntimeError):
                return None
        return made

    def product(self, x: Tensor) -> Tensor:
        """x (m, K) float32 -> x q^T (m, N) float32."""
        step = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).add_(1e-30).mul_(1 / 63)
        in_steps = (x / step).nan_to_num_(0.0)  # a row with NaN or inf comes out as NaN by its step, and alone
        first = in_steps.round()
        second = in_steps.sub_(first).mul_(126)
        edges = self._edges.expand(x.shape[0], -1)
        digits = torch.cat((first, edges, second, edges), dim=-1).view(2 * x.shape[0], -1)
        y = torch.fbgemm_linear_int8_weight_fp32_activation(
            digits, self._shape, self._packed, self._sums, 1.0, 0, self._bias
        ).view(x.shape[0], 2, -1)
        return torch.add(y[:, 0], y[:, 1], alpha=1 / 126).mul_(step)

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        """The packed matrix is known to FBGEMM by its address, so that copies share it."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a packed matrix cannot be pickled")


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
    _replace(model, tied=model.lm_head is None)
    return model.requires_grad_(False)


def _replace(parent: nn.Module, tied: bool) -> None:
    """Everything below a module that has an int8 form; a part is freed before the next is begun."""
    for name, part in list(parent.named_children()):
        if isinstance(part, Embedding):
            setattr(parent, name, Int8Embedding(part.weight, tied))
        elif isinstance(part, FeedForward):
            setattr(parent, name, Int8FeedForward(part))
        elif isinstance(part, Experts):
            setattr(parent, name, Int8Experts(part))
        elif not isinstance(part, Linear):
            _replace(part, tied)
        elif name != KEPT:
            setattr(parent, name, Int8Head(part.weight) if name == "lm_head" else Int8Linear(part.weight))
