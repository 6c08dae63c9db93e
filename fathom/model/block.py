"""One layer: h + attention(norm(h)), then h + feed-forward(norm(h)).                         pre-norm, DeepSeek-V2 2"""

from __future__ import annotations

from torch import Tensor, nn

from fathom.model.attention.cache import LayerCache, Visibility
from fathom.model.attention.gqa import GQAConfig
from fathom.model.attention.mla import MLAConfig
from fathom.model.attention.variants import build_attention
from fathom.model.feedforward import FeedForward
from fathom.model.moe.balance import RoutingReport
from fathom.model.moe.layer import MoE, MoEConfig
from fathom.model.norm import RMSNorm
from fathom.model.rope import Rope


class Block(nn.Module):
    """h (B, T, D) -> (h (B, T, D), what the router did or None in a dense layer)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        rms_norm_eps: float,
        attention: GQAConfig | MLAConfig,
        moe: MoEConfig | None,
        layer: int,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, rms_norm_eps)
        self.self_attn = build_attention(attention, hidden_size)
        self.post_attention_layernorm = RMSNorm(hidden_size, rms_norm_eps)
        self.mlp = MoE(moe, hidden_size, layer) if moe is not None else FeedForward(hidden_size, intermediate_size)

    def forward(
        self, h: Tensor, rope: Rope, visible: Visibility, real: Tensor | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, RoutingReport | None]:
        h = h + self.self_attn(self.input_layernorm(h), rope, visible, cache)
        x = self.post_attention_layernorm(h)
        if isinstance(self.mlp, MoE):
            y, report = self.mlp(x, real)
            return h + y, report
        return h + self.mlp(x), None
