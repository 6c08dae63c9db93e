"""Multi-token prediction.                                                DeepSeek-V3 report 2.2, eq. 21-25

    h'_i = M_k [norm(Emb(t_i+k)) ; norm(h_i^(k-1))]       i = 1 .. T - k
    h^k  = Block_k(h')
    p(t_i+k+1) = softmax(head(norm(h_i^k)))

Embedding and head are the main model's own, parameters and gradients. h^0 is the main model's hidden state after its
final norm, and the embedding comes first in the product: both as in the released weights and the engines that run
them (the paper writes the hidden state first).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from fathom.knobs import Knobs
from fathom.model.attention.cache import LayerCache, Visibility
from fathom.model.block import Block
from fathom.model.linear import Linear
from fathom.model.moe.balance import RoutingReport
from fathom.model.norm import RMSNorm
from fathom.model.rope import Rope


class MTPConfig(Knobs):
    """Multi-token prediction."""

    num_nextn_predict_layers: int = Field(default=0, ge=0)
    """Depth: how many tokens beyond the next are predicted."""
    weight: float = Field(default=0.3, ge=0)
    """lambda: weight of the mean MTP loss beside the main loss."""
    final_weight: float = Field(default=0.1, ge=0)
    """lambda in the last part of the run."""
    final_from: float = Field(default=0.67, ge=0, le=1)
    """Share of the run after which final_weight holds (DeepSeek-V3: 10 of 14.8 trillion tokens)."""

    def weight_at(self, progress: float) -> float:
        """lambda at a share of the run between 0 and 1."""
        return self.weight if progress < self.final_from else self.final_weight


class SharedHead(nn.Module):
    """The norm before the shared output head (`shared_head.norm` in released checkpoints)."""

    def __init__(self, hidden_size: int, rms_norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, rms_norm_eps)


class MTPLayer(nn.Module):
    """One depth: hidden (B, T, D) of the depth before and embeddings (B, T, D) of the tokens ahead -> hidden,
    normed."""

    def __init__(self, block: Block, hidden_size: int, rms_norm_eps: float) -> None:
        super().__init__()
        self.enorm = RMSNorm(hidden_size, rms_norm_eps)
        self.hnorm = RMSNorm(hidden_size, rms_norm_eps)
        self.eh_proj = Linear(2 * hidden_size, hidden_size)
        self.block = block
        self.shared_head = SharedHead(hidden_size, rms_norm_eps)

    def merge(self, hidden: Tensor, ahead: Tensor) -> Tensor:
        """M_k [norm(embedding) ; norm(hidden)]."""
        return self.eh_proj(torch.cat((self.enorm(ahead), self.hnorm(hidden)), dim=-1))

    def forward(
        self,
        hidden: Tensor,
        ahead: Tensor,
        rope: Rope,
        visible: Visibility,
        real: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, RoutingReport | None]:
        out, report = self.block(self.merge(hidden, ahead), rope, visible, real, cache)
        return self.shared_head.norm(out), report
