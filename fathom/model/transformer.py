"""The whole model: embedding, layers, final norm, head, and the MTP depths beside it.

    h_0 = Emb(t);   h_l = Block_l(h_l-1);   logits = W_head norm(h_L)

Names of parameters are those of Hugging Face's DeepSeek models in memory, without the `model.` in front.

Letters  B rows  T new tokens  S tokens seen  D model  V vocabulary  E experts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fathom.errors import ConfigError
from fathom.knobs import Knobs
from fathom.model.attention.cache import LayerCache, Visibility
from fathom.model.attention.gqa import GQAConfig
from fathom.model.attention.variants import AttentionConfig
from fathom.model.block import Block
from fathom.model.linear import Embedding, Linear
from fathom.model.moe.balance import LossFree, RoutingReport, update_bias
from fathom.model.moe.layer import MoE, MoEConfig
from fathom.model.mtp import MTPConfig, MTPLayer
from fathom.model.native import kernels
from fathom.model.ngram.memory import LARGEST, NgramConfig, NgramMemory
from fathom.model.norm import RMSNorm
from fathom.model.one_token import OneToken
from fathom.model.rope import Rope


class ModelConfig(Knobs):
    """The architecture. Keys are those of Hugging Face's DeepSeek configurations, grouped by part."""

    vocab_size: int | None = Field(default=None, gt=0)
    """V; null: the tokenizer's size. May be larger than the tokenizer (padded), never smaller."""
    hidden_size: int = Field(default=512, gt=0)
    """D."""
    intermediate_size: int = Field(default=2048, gt=0)
    """Width of the dense feed-forward network."""
    num_hidden_layers: int = Field(default=8, gt=0)
    """Layers, without the MTP depths."""
    hidden_act: Literal["silu"] = "silu"
    """Activation inside SwiGLU."""
    max_position_embeddings: int = Field(default=512, gt=0)
    """The longest sequence, in tokens."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    """eps of every norm but the two latent ones, which use 1e-6."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    depth_aware_init: bool = True
    """Divide the initial output projections of every layer by sqrt(2 num_hidden_layers)."""
    attention: AttentionConfig = GQAConfig()
    """kind: gqa or mla."""
    moe: MoEConfig | None = None
    """null: a dense model."""
    mtp: MTPConfig = MTPConfig()
    """Multi-token prediction."""
    ngram: NgramConfig | None = None
    """A memory of n-grams beside the network, or null."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        heads = self.attention
        if isinstance(heads, GQAConfig) and heads.head_dim is None:
            if self.hidden_size % heads.num_attention_heads:
                raise ValueError(
                    f"hidden_size is {self.hidden_size}, which {heads.num_attention_heads} attention heads "
                    "do not divide; change attention.num_attention_heads, or give attention.head_dim"
                )
            if heads.size(self.hidden_size) % 2:
                raise ValueError(
                    f"hidden_size {self.hidden_size} over {heads.num_attention_heads} heads makes head_dim "
                    f"{heads.size(self.hidden_size)}; rotary pairs need an even number (or give attention.head_dim)"
                )
        if self.moe is not None and self.moe.layers is not None:
            beyond = [layer for layer in self.moe.layers if layer >= self.num_hidden_layers]
            if beyond:
                raise ValueError(
                    f"moe.layers names {beyond}, but num_hidden_layers is {self.num_hidden_layers}: "
                    f"layers count from 0 to {self.num_hidden_layers - 1}"
                )
        scaling = heads.rope_scaling
        if (
            scaling is not None
            and self.max_position_embeddings > scaling.factor * scaling.original_max_position_embeddings
        ):
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}, more than rope_scaling.factor x "
                f"original_max_position_embeddings = {scaling.factor * scaling.original_max_position_embeddings:g}"
            )
        if self.ngram is not None and self.mtp.num_nextn_predict_layers:
            raise ValueError(
                "ngram and mtp.num_nextn_predict_layers are both given, and MTP depths have no n-gram memory; "
                "give one of them"
            )
        self.check_vocabulary()
        return self

    def check_vocabulary(self) -> None:
        """ConfigError: it is too large for the n-gram memory, which may show only when the tokenizer is known."""
        if self.ngram is not None and (self.vocab_size or 0) > LARGEST:
            raise ConfigError(
                f"model.ngram is for vocabularies of at most {LARGEST:,} tokens, and there are {self.vocab_size:,}; "
                "use tokenizer: {kind: character}, or leave model.ngram out"
            )

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The MoE of a layer, or None where it is dense. MTP depths (from num_hidden_layers on) are MoE if the model
        has any."""
        if self.moe is None:
            return None
        has_any = any(self.moe.is_moe(i) for i in range(self.num_hidden_layers))
        is_moe = self.moe.is_moe(layer) if layer < self.num_hidden_layers else has_any
        return self.moe if is_moe else None

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """Numbers that a layer's cache keeps for a token, tensor by tensor."""
        return self.attention.cache_widths(self.hidden_size)


class Trunk(NamedTuple):
    """hidden (B, T, D) after the final norm, with an n-gram memory (B, T, D + V): beside it what that adds to the
    logits. routing: one report a MoE layer, in order of layers."""

    hidden: Tensor
    routing: tuple[RoutingReport, ...]


def call(block: nn.Module, *arguments: Any) -> Any:
    """Run a block as it is; `Transformer.run_block` may be replaced by one that recomputes activations."""
    return block(*arguments)


class Transformer(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is null: fill it from the tokenizer before building the model")
        config.check_vocabulary()
        self.config = config
        self.run_block: Callable[..., Any] = call
        self._one_token = OneToken()
        width, eps, count = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers

        def block(layer: int) -> Block:
            return Block(width, config.intermediate_size, eps, config.attention, config.moe_of(layer), layer)

        self.embed_tokens = Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(block(i) for i in range(count))
        self.norm = RMSNorm(width, eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(width, config.vocab_size)
        self.memory = None if config.ngram is None else NgramMemory(config.ngram, width, config.vocab_size)
        depths = range(config.mtp.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(MTPLayer(block(count + k), width, eps) for k in depths)

    @property
    def head_weight(self) -> Tensor:
        """The output head (V, D): lm_head, or the embedding when tied. With an n-gram memory (V, D + V) = [W ; 1], for
        the hidden state has what is added to each logit beside it."""
        matrix = (self.embed_tokens if self.lm_head is None else self.lm_head).dense()
        if self.memory is None:
            return matrix
        return torch.cat((matrix, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)), dim=1)

    def rope(self, positions: Tensor) -> Rope:
        """Rotary angles at positions (B, T), for all layers."""
        attention = self.config.attention
        rotary = attention.rotary_dim(self.config.hidden_size)
        return Rope.at(positions, rotary, attention.rope_theta, attention.rope_scaling)

    def trunk(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        real: Tensor | None = None,
        origins: Tensor | None = None,
    ) -> Trunk:
        """Everything but the head. positions (B, T): default counts on from the caches. segments (B, T): documents that
        do not see each other, -1 at padding; not together with caches. caches: one a layer. real (B, T): false at
        padding, which routing reports leave out; default as segments say. origins (B): see `NgramMemory.recall`."""
        new, device = tokens.shape[1], tokens.device
        visible, places = self._sight(new, device, segments, caches[0] if caches else None)
        rope = self.rope(places.expand_as(tokens) if positions is None else positions)
        if real is None and segments is not None:
            real = segments >= 0
        h, recalled = kernels.widened(self.embed_tokens(tokens)), None
        if self.memory is not None:
            before = caches[0].before(tokens, self.memory.reach) if caches else None
            recalled = self.memory.recall(tokens, before, origins, segments)
            h = h + self.memory.enter(recalled, len(tokens))
        h, reports = self._layers(h, rope, visible, real, caches)
        hidden = self.norm(h)
        if self.memory is not None and recalled is not None:
            hidden = torch.cat((hidden, self.memory.leave(hidden, recalled)), dim=-1)
        return Trunk(hidden, tuple(reports))

    def _layers(
        self, h: Tensor, rope: Rope, visible: Visibility, real: Tensor | None, caches: Sequence[LayerCache] | None
    ) -> tuple[Tensor, list[RoutingReport]]:
        """One layer after the other, or all at once for one new token a row."""
        if caches and (done := self._one_token(self.layers, h, rope, caches, real)):
            return done
        reports = []
        for i, block in enumerate(self.layers):
            h, report = self.run_block(block, h, rope, visible, real, caches[i] if caches else None)
            if report is not None:
                reports.append(report)
        return h, reports

    def look_ahead(
        self,
        depth: int,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        segments: Tensor | None,
        cache: LayerCache | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, RoutingReport | None]:
        """MTP depth 1, 2, ...: hidden (B, T - depth, D) of the depth before, tokens (B, T - depth) that lie `depth`
        ahead of it, positions and segments (B, T - depth) of the hidden states -> hidden (B, T - depth, D), normed
        for the head. cache: of this depth, whose positions those given follow; not together with segments. real: as
        in `trunk`."""
        visible, _ = self._sight(hidden.shape[1], hidden.device, segments, cache)
        if real is None and segments is not None:
            real = segments >= 0
        layer = self.mtp[depth - 1]
        ahead = kernels.widened(self.embed_tokens(tokens))
        return self.run_block(layer, hidden, ahead, self.rope(positions), visible, real, cache)

    def _sight(
        self, new: int, device: torch.device, segments: Tensor | None, cache: LayerCache | None
    ) -> tuple[Visibility, Tensor]:
        """What T new tokens may look at, and where they stand (B or 1, T)."""
        if cache is None:
            return Visibility.of(new, new, segments, device), torch.arange(new, device=device).unsqueeze(0)
        if segments is not None:
            raise ValueError("segments and a cache were given together: a cache holds one document a row")
        return cache.visible(new, device), cache.places(new, device)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) after the final norm, or (..., D + V) as `trunk` returns it -> logits (..., V)."""
        if self.memory is not None:
            hidden, added = hidden.tensor_split([self.config.hidden_size], dim=-1)
            hidden = hidden if kernels.serve(hidden) else hidden.to(self.norm.weight.dtype)
            return added + (self.embed_tokens.as_head(hidden) if self.lm_head is None else self.lm_head(hidden))
        return self.embed_tokens.as_head(hidden) if self.lm_head is None else self.lm_head(hidden)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        return self.logits(self.trunk(tokens, positions, segments, caches).hidden)

    def moe_layers(self) -> dict[int, MoE]:
        """Every MoE layer by its number, MTP depths included."""
        return {module.layer: module for module in self.modules() if isinstance(module, MoE)}

    @torch.no_grad()
    def balance_step(self, counts: Mapping[int, Tensor], progress: float) -> None:
        """Move the selection biases once, after an optimizer step: counts (E) by layer, from all its micro-batches and
        ranks; progress: share of the run, which sets the rate. Does nothing for other kinds of balancing."""
        for number, layer in self.moe_layers().items():
            balance = layer.config.balance
            if isinstance(balance, LossFree) and number in counts:
                bias = layer.gate.e_score_correction_bias
                update_bias(balance.update, bias, counts[number].to(bias.device), balance.rate_at(progress))
