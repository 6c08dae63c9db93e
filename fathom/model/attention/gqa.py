"""Grouped-query attention.                                                                  Ainslie et al. 2023

    q = rope(W_q h),  k = rope(W_k h),  v = W_v h;   query head i reads key-value head floor(i / (N / N_kv))

One key-value head is multi-query attention, N_kv = N is multi-head attention. The cache keeps k (after rope) and v.

Letters  B rows  T new tokens  S tokens seen  D model  N heads  H head
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from fathom.knobs import Knobs
from fathom.model.attention.cache import LayerCache, Visibility
from fathom.model.attention.kernel import attend
from fathom.model.linear import Linear
from fathom.model.rope import Rope, YarnConfig, softmax_scale


class GQAConfig(Knobs):
    """Grouped-query attention; multi-query with one key-value head, multi-head with as many as query heads."""

    kind: Literal["gqa"] = "gqa"
    num_attention_heads: int = Field(default=8, gt=0)
    """N: query heads."""
    num_key_value_heads: int = Field(default=2, gt=0)
    """N_kv: key-value heads; a divisor of num_attention_heads."""
    head_dim: int | None = Field(default=None, gt=0)
    """H; null: hidden_size / num_attention_heads. Even, for rotary pairs."""
    rope_theta: float = Field(default=10000.0, gt=1)
    """Base of the rotary frequencies."""
    rope_scaling: YarnConfig | None = None
    """YaRN, or null."""

    @model_validator(mode="after")
    def _heads_divide(self) -> GQAConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            divisors = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}, which does not divide num_attention_heads "
                f"{self.num_attention_heads}; possible are {', '.join(map(str, divisors))}"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary pairs need an even number")
        return self

    def size(self, hidden_size: int) -> int:
        """H for a model of this width."""
        return self.head_dim or hidden_size // self.num_attention_heads

    def rotary_dim(self, hidden_size: int) -> int:
        """R: the whole head is turned."""
        return self.size(hidden_size)

    def cache_widths(self, hidden_size: int) -> tuple[int, ...]:
        """Numbers that a layer's cache keeps for a token: k and v."""
        width = self.num_key_value_heads * self.size(hidden_size)
        return (width, width)


class GQA(nn.Module):
    """h (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GQAConfig, hidden_size: int) -> None:
        super().__init__()
        self.head_dim = head = config.size(hidden_size)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale = softmax_scale(head, config.rope_scaling)
        self.q_proj = Linear(hidden_size, self.heads * head)
        self.k_proj = Linear(hidden_size, self.kv_heads * head)
        self.v_proj = Linear(hidden_size, self.kv_heads * head)
        self.o_proj = Linear(self.heads * head, hidden_size)

    def forward(self, h: Tensor, rope: Rope, visible: Visibility, cache: LayerCache | None = None) -> Tensor:
        q = rope.turn(self.q_proj(h).unflatten(-1, (self.heads, -1)))
        k = rope.turn(self.k_proj(h).unflatten(-1, (self.kv_heads, -1)))
        v = self.v_proj(h)
        if cache is not None:
            flat, v = cache.append(k.flatten(-2), v)
            k = flat.unflatten(-1, (self.kv_heads, -1))
        out = attend(q, k, v.unflatten(-1, (self.kv_heads, -1)), self.scale, visible)
        return self.o_proj(out.flatten(-2))
