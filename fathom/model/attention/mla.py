"""Multi-head latent attention.                           DeepSeek-V2 report 2.1 (eq. 9-19), DeepSeek-V3 report 2.1.1

    c   = norm(W_dkv h)          what the cache keeps: C numbers a token ...
    k_r = rope(W_kr h)           ... and R more, shared by all heads
    k   = [W_uk c ; k_r]         keys and values are never stored:
    v   = W_uv c                 rebuilt to train, absorbed to decode
    q   = [W_uq c_q ; rope(W_qr c_q)],  c_q = norm(W_dq h)      or straight from h without a query rank
    o   = softmax(q k^T * scale) v,     scale = (H + R)^-1/2 (times YaRN's mscale^2)

Decoding never builds k or v. Since q . (W_uk c) = (W_uk^T q) . c, the query is carried into latent space once and
attends to c itself (`_absorbed`). The two paths are the same function; tests/model/test_attention.py holds them
together. Row layouts are those of the released checkpoints: kv_a [latent | rotary], kv_b a head [k | v], q a head
[plain | rotary]. Both latent norms use eps 1e-6, whatever the model's own norms use, as in every released
implementation.

Letters  B rows  T new tokens  S tokens seen  D model  N heads  C latent  R rotary  H head without rotary  V value head
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fathom.knobs import Knobs
from fathom.model.attention.cache import LayerCache, Visibility
from fathom.model.attention.kernel import attend
from fathom.model.linear import Linear
from fathom.model.native import kernels
from fathom.model.native.kernels import Kept
from fathom.model.norm import RMSNorm
from fathom.model.precision import widen
from fathom.model.rope import Rope, YarnConfig, softmax_scale

LATENT_NORM_EPS = 1e-6


class MLAConfig(Knobs):
    """Multi-head latent attention."""

    kind: Literal["mla"]
    num_attention_heads: int = Field(gt=0)
    """N."""
    q_lora_rank: int | None = Field(default=None, gt=0)
    """Rank of the queries' low-rank projection; null: queries come straight from the hidden state."""
    kv_lora_rank: int = Field(gt=0)
    """C: width of the latent that the cache keeps."""
    qk_nope_head_dim: int = Field(gt=0)
    """H: the part of a query or key head without rotation."""
    qk_rope_head_dim: int = Field(gt=0)
    """R: the rotated part, shared by all heads on the key side; even."""
    v_head_dim: int = Field(gt=0)
    """V: width of a value head."""
    rope_theta: float = Field(default=10000.0, gt=1)
    """Base of the rotary frequencies."""
    rope_scaling: YarnConfig | None = None
    """YaRN, or null."""

    @model_validator(mode="after")
    def _even(self) -> MLAConfig:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary pairs need an even number")
        return self

    def rotary_dim(self, hidden_size: int) -> int:
        """R."""
        return self.qk_rope_head_dim

    def cache_widths(self, hidden_size: int) -> tuple[int, ...]:
        """Numbers that a layer's cache keeps for a token: the latent and the rotary key."""
        return (self.kv_lora_rank, self.qk_rope_head_dim)


class MLA(nn.Module):
    """h (B, T, D) -> (B, T, D)."""

    def __init__(self, config: MLAConfig, hidden_size: int) -> None:
        super().__init__()
        self.heads, self.latent = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rotary, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = softmax_scale(self.nope + self.rotary, config.rope_scaling)
        q_out = self.heads * (self.nope + self.rotary)
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden_size, q_out)
        else:
            self.q_a_proj = Linear(hidden_size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, q_out)
        self.low_rank_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(hidden_size, self.latent + self.rotary)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, hidden_size)

    def forward(
        self,
        h: Tensor,
        rope: Rope,
        visible: Visibility,
        cache: LayerCache | None = None,
        absorbed: bool | None = None,
    ) -> Tensor:
        """absorbed: which of the two equal paths; None chooses the one with fewer operations, expanded in training."""
        quick = self.o_proj.takes(h, h.shape[0] * h.shape[1]) and self.alike
        q, c, k_rope = (self._enter_quick if quick else self._enter)(h, rope)
        if cache is not None:
            c, k_rope = cache.append(c, k_rope)
        if absorbed is None:
            absorbed = cache is not None and self._absorbing_is_cheaper(h.shape[1], c.shape[1])
        if quick and absorbed and c.dtype in kernels.KINDS:
            mask, causal, kv_b = visible.mask, visible.causal, self.kv_b_proj.weight
            return kernels.latent_leave(q, c, k_rope, kv_b, mask, causal, self.scale, self.o_proj.kept)
        out = (self._absorbed if absorbed else self._expanded)(q, c, k_rope, visible)
        return self.o_proj(out.flatten(-2))

    @property
    def alike(self) -> bool:
        """Whether the kernels know how all weights are kept."""
        norms = [self.kv_a_layernorm.weight, *([self.q_a_layernorm.weight] if self.low_rank_query else [])]
        return (
            kernels.alike(*self.kept.values())
            and kernels.alike((self.kv_b_proj.weight, None))
            and kernels.alike(*((norm, None) for norm in norms))
        )

    @property
    def kept(self) -> dict[str, Kept]:
        """W_dq, W_uq or W_q, W_dkv and W_o as the kernels take them, by their names there."""
        found = {"kv_a": self.kv_a_proj_with_mqa.kept, "o": self.o_proj.kept}
        if self.low_rank_query:
            return {"q_a": self.q_a_proj.kept, "q_b": self.q_b_proj.kept, **found}
        return {"q_b": self.q_proj.kept, **found}

    def _enter(self, h: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, N, H + R), c (B, T, C) and k_r (B, T, R)."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h))) if self.low_rank_query else self.q_proj(h)
        q_nope, q_rope = q.view(*h.shape[:2], self.heads, -1).split((self.nope, self.rotary), dim=-1)
        c, k_rope = self.kv_a_proj_with_mqa(h).split((self.latent, self.rotary), dim=-1)
        k_rope = rope.turn(k_rope.unsqueeze(2)).squeeze(2)
        return torch.cat((q_nope, rope.turn(q_rope)), dim=-1), self.kv_a_layernorm(c), k_rope

    def _enter_quick(self, h: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """The same by the compiled kernel."""
        kept = self.kept
        low = (kept["q_a"], self.q_a_layernorm.weight) if self.low_rank_query else None
        return kernels.latent_enter(
            h, low, kept["q_b"], kept["kv_a"],
            self.kv_a_layernorm.weight, LATENT_NORM_EPS, self.heads, self.rotary, rope.cos, rope.sin,
        )  # fmt: skip

    def _absorbing_is_cheaper(self, new: int, seen: int) -> bool:
        """Multiplications a head: expanded S C (H + V) + T S (H + R + V); absorbed T C (H + V) + T S (2 C + R)."""
        expanded = seen * self.latent * (self.nope + self.value) + new * seen * (self.nope + self.rotary + self.value)
        return new * self.latent * (self.nope + self.value) + new * seen * (2 * self.latent + self.rotary) < expanded

    def _expanded(self, q: Tensor, c: Tensor, k_rope: Tensor, visible: Visibility) -> Tensor:
        """Rebuild every key and value from the latents c (B, S, C); (B, T, N, V)."""
        k_nope, v = self.kv_b_proj(c.to(q.dtype)).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1).to(k_nope.dtype)), dim=-1)
        return attend(q, k, v, self.scale, visible)

    def _absorbed(self, q: Tensor, c: Tensor, k_rope: Tensor, visible: Visibility) -> Tensor:
        """Attend in latent space; (B, T, N, V).

            s_ij = ((W_uk,i^T q_i) . c_j + q_r,i . k_r,j) scale,   o_i = W_uv,i sum_j p_ij c_j

        Heads and new tokens are folded into the rows of one matrix product a sequence, since a product broadcast over
        heads is several times slower. One sequence, or one new token each, is folded without a copy.
        """
        rows, new = q.shape[:2]
        dtype = q.dtype
        q_nope, q_rope = q.split((self.nope, self.rotary), dim=-1)
        weight = self.kv_b_proj.weight.to(dtype).view(self.heads, -1, self.latent)  # (N, H + V, C)
        w_uk, w_uv = weight[:, : self.nope], weight[:, self.nope :]
        c, k_rope = c.to(dtype), k_rope.to(dtype)
        carried = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk)  # (N, B T, C)
        carried = carried.view(self.heads, rows, new, -1).transpose(0, 1).flatten(1, 2)  # (B, N T, C)
        turned = q_rope.to(dtype).transpose(1, 2).flatten(1, 2)  # (B, N T, R)
        scores = torch.bmm(turned, k_rope.transpose(1, 2))
        scores = torch.baddbmm(scores, carried, c.transpose(1, 2), beta=self.scale, alpha=self.scale)
        scores = widen(scores).view(rows, self.heads, new, -1)
        bias = visible.bias(new, c.shape[1], c.device)
        if bias is not None:
            scores = scores + bias
        weights = scores.softmax(-1).to(dtype).flatten(1, 2)
        mixed = torch.bmm(weights, c).view(rows, self.heads, new, -1).transpose(0, 1).flatten(1, 2)  # (N, B T, C)
        out = torch.bmm(mixed, w_uv.transpose(1, 2)).transpose(0, 1)  # (B T, N, V)
        return out.reshape(rows, new, self.heads, -1)
