"""What a model costs, from its configuration alone: parameters, operations, cache and memory. No weight is ever made.

    parameters     2 V D (V D when tied) + D + sum over layers (attention + 2 D + feed-forward) + n-gram memory
    active         the same with K of E routed experts, and without an input embedding that is only looked up (untied)
    a token        2 operations a matrix weight, and 2 S N (H + V) a layer for scores and their sums over S seen tokens
    training       three times the forward pass: once down, twice up

Parameters are counted as DeepSeek counts them: without the MTP depths, which are told apart. Norms count as
parameters and not as operations. tests/model/test_cost.py holds all of it against modules, released models and
measured memory.

Letters  B rows  T tokens of a row  S tokens seen  D model  N heads  E experts  K chosen  C latent  R rotary  H head
V vocabulary or value
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from fathom.errors import ConfigError
from fathom.model.attention.mla import MLAConfig
from fathom.model.loss import chunk_rows
from fathom.model.transformer import ModelConfig

Precision = Literal["float32", "bfloat16", "float16"]
PAPER_GROUPS = 8  # the GQA that DeepSeek-V2 (table 1) compares MLA with has 8 key-value heads


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step at its fullest, by part; an estimate, since allocators and kernels keep more.

    weights      float32 masters, and their 16-bit copies under mixed precision
    gradients    float32
    optimizer    moments: two a weight for AdamW, one for a matrix under Muon
    activations  what the forward pass keeps for the backward pass
    logits       the chunk of logits that stands at once, with its slope
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Size:
    """Weights of a part: matrices that a token is multiplied with, matrices that it passes by, and vectors."""

    used: int = 0
    unused: int = 0
    vectors: int = 0

    @property
    def total(self) -> int:
        return self.used + self.unused + self.vectors

    def __add__(self, other: Size) -> Size:
        return Size(self.used + other.used, self.unused + other.unused, self.vectors + other.vectors)


class Cost:
    """Formulas for one `ModelConfig`, whose vocab_size must be known."""

    def __init__(self, config: ModelConfig) -> None:
        if config.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is null, so the size of the model is not known: give a number, or the tokenizer"
            )
        self.config = config
        self.vocabulary: int = config.vocab_size

    # --- parameters

    def attention(self) -> Size:
        """One layer's attention. MLA: D c_q + c_q + c_q N (H + R), or D N (H + R) without a query rank; D (C + R) + C
        + C N (H + V) + N V D. GQA: 2 D H (N + N_kv)."""
        a, width = self.config.attention, self.config.hidden_size
        heads = a.num_attention_heads
        if not isinstance(a, MLAConfig):
            return Size(used=2 * width * a.size(width) * (heads + a.num_key_value_heads))
        rank, latent, rotary = a.q_lora_rank, a.kv_lora_rank, a.qk_rope_head_dim
        q_out = heads * (a.qk_nope_head_dim + rotary)
        query = width * q_out if rank is None else rank * (width + q_out)
        key_value = width * (latent + rotary) + latent * heads * (a.qk_nope_head_dim + a.v_head_dim)
        return Size(used=query + key_value + heads * a.v_head_dim * width, vectors=latent + (rank or 0))

    def feed_forward(self, layer: int) -> Size:
        """One layer's network: 3 D I when dense, else 3 D I_e (E + shared) + E D, of which K + shared experts are
        used."""
        moe, width = self.config.moe_of(layer), self.config.hidden_size
        if moe is None:
            return Size(used=3 * width * self.config.intermediate_size)
        expert = 3 * width * moe.moe_intermediate_size
        chosen = moe.num_experts_per_tok + moe.n_shared_experts
        idle = moe.n_routed_experts - moe.num_experts_per_tok
        return Size(used=expert * chosen + moe.n_routed_experts * width, unused=expert * idle)

    def layer(self, layer: int) -> Size:
        """Attention, feed-forward and two norms; MTP depth k is layer num_hidden_layers + k."""
        return self.attention() + self.feed_forward(layer) + Size(vectors=2 * self.config.hidden_size)

    def memory(self) -> Size:
        """The n-gram memory's two projections, (V + 2 K) D and D K + K; its counts are no weights."""
        ngram, width = self.config.ngram, self.config.hidden_size
        if ngram is None:
            return Size()
        return Size(used=(self.vocabulary + 3 * ngram.order) * width, vectors=ngram.order)

    def trunk(self) -> Size:
        """All layers, the final norm and the head; the input embedding is not in it unless tied."""
        layers = sum((self.layer(i) for i in range(self.config.num_hidden_layers)), self.memory())
        return layers + Size(used=self.vocabulary * self.config.hidden_size, vectors=self.config.hidden_size)

    def mtp(self) -> Size:
        """All MTP depths: two input norms, M_k (D x 2 D), a layer and a norm each; embedding and head are shared."""
        count, width = self.config.num_hidden_layers, self.config.hidden_size
        own = Size(used=2 * width * width, vectors=3 * width)
        return sum((self.layer(count + k) + own for k in range(self.config.mtp.num_nextn_predict_layers)), Size())

    def parameters(self) -> int:
        """Weights of the main model, without the MTP depths."""
        embedding = 0 if self.config.tie_word_embeddings else self.vocabulary * self.config.hidden_size
        return self.trunk().total + embedding

    def active_parameters(self) -> int:
        """Weights that one token uses: K of E experts, the tied matrix once (as head), no input embedding."""
        trunk = self.trunk()
        return trunk.used + trunk.vectors

    def mtp_parameters(self) -> int:
        """Weights of the MTP depths beyond what they share with the main model."""
        return self.mtp().total

    # --- operations

    def score_flops(self, context: float) -> float:
        """One layer's 2 S N (H + V): scores over S seen tokens, and the mean of their values."""
        a, width = self.config.attention, self.config.hidden_size
        if isinstance(a, MLAConfig):
            numbers = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
        else:
            numbers = 2 * a.size(width)
        return 2.0 * context * a.num_attention_heads * numbers

    def flops_per_token(self, context: float) -> float:
        """Forward pass of one token of the main model that sees `context` tokens, itself among them."""
        return 2.0 * self.trunk().used + self.config.num_hidden_layers * self.score_flops(context)

    def training_flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward of a token of a row, MTP depths and their use of the head included; recomputation is
        not, so that a utilisation made with it (MFU) counts useful work only. A causal row sees (T + 1) / 2 tokens on
        average."""
        seen = (sequence_length + 1) / 2
        depths = self.config.mtp.num_nextn_predict_layers
        heads = depths * self.vocabulary * self.config.hidden_size
        mtp = 2.0 * (self.mtp().used + heads) + depths * self.score_flops(seen)
        return 3.0 * (self.flops_per_token(seen) + mtp)

    # --- cache

    def cache_bytes_per_token(self, dtype_bytes: float = 2) -> int:
        """Bytes that all layers together keep for one token of context; 2 bytes a number: bfloat16."""
        return int(sum(self.config.cache_widths) * self.config.num_hidden_layers * dtype_bytes)

    def cache_comparison(self, dtype_bytes: float = 2) -> dict[str, int]:
        """The same for this model had it MLA, GQA or MHA: its own kind as it is, the others as DeepSeek-V2's table 1
        has them (MHA 2 N H; GQA with 8 key-value heads, or half of N if fewer; MLA C + R = 4 H + H / 2) with its
        number and size of heads."""
        a = self.config.attention
        heads = a.num_attention_heads
        head = a.qk_nope_head_dim if isinstance(a, MLAConfig) else a.size(self.config.hidden_size)
        groups = min(PAPER_GROUPS, max(1, heads // 2))
        numbers = {"mla": 4 * head + head // 2, "gqa": 2 * groups * head, "mha": 2 * heads * head}
        numbers[a.kind] = sum(self.config.cache_widths)
        return {kind: int(n * self.config.num_hidden_layers * dtype_bytes) for kind, n in numbers.items()}

    # --- memory of a training step

    def _kept_by_attention(self, narrow: int) -> int:
        """Bytes a token that attention keeps: its input, the two latents before and after their norm, q, k, padded v
        and o for the kernel, and o's input."""
        a, width = self.config.attention, self.config.hidden_size
        heads = a.num_attention_heads
        if isinstance(a, MLAConfig):
            padded = max(a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim)
            latents = 2 * (a.q_lora_rank or 0) + 2 * a.kv_lora_rank + a.qk_rope_head_dim
            return narrow * (width + latents + 4 * heads * padded + heads * a.v_head_dim)
        return narrow * (width + 4 * heads * a.size(width))

    def _kept_by_network(self, layer: int, narrow: int) -> int:
        """Bytes a token that a feed-forward network keeps: inputs, gate, up and product of every expert it visits; an
        MoE also logits, affinities and indices."""
        moe, width = self.config.moe_of(layer), self.config.hidden_size
        if moe is None:
            return narrow * (width + 3 * self.config.intermediate_size)
        k, inner = moe.num_experts_per_tok, moe.moe_intermediate_size
        routed = narrow * k * (width + 3 * inner) + 8 * moe.n_routed_experts + 48 * k
        return routed + narrow * (width + 3 * moe.n_shared_experts * inner) + (4 - narrow) * width

    def _kept_by_layer(self, layer: int, narrow: int) -> int:
        """The two norms keep the residual stream, which stays float32; then attention and feed-forward."""
        stream = 2 * 4 * self.config.hidden_size
        return stream + self._kept_by_attention(narrow) + self._kept_by_network(layer, narrow)

    def activation_bytes(self, tokens: int, precision: Precision = "float32", recompute: bool = False) -> int:
        """What the forward pass of a micro-batch keeps. With recomputation: each layer's input, and all of one
        layer."""
        narrow = 4 if precision == "float32" else 2
        count, width = self.config.num_hidden_layers, self.config.hidden_size
        depths = self.config.mtp.num_nextn_predict_layers
        layers = [self._kept_by_layer(i, narrow) for i in range(count + depths)]
        kept = max(layers) + 4 * width * len(layers) if recompute else sum(layers)
        ends = (4 + 2 * narrow) * width  # under the final norm; the head's input and its gradient
        depth = (4 + 2 * narrow) * width + ends  # under the embedding's norm and the join of two; then as at the end
        return tokens * (kept + ends + depths * depth)

    def training_memory(
        self,
        batch_size: int,
        sequence_length: int,
        precision: Precision = "float32",
        recompute: bool = False,
        optimizer: Literal["adamw", "muon"] = "adamw",
    ) -> StepMemory:
        """Bytes of a training step of `batch_size` rows (a micro-batch) on one device."""
        everything = self.parameters() + self.mtp_parameters()
        trunk, mtp = self.trunk(), self.mtp()
        ends = self.vocabulary * self.config.hidden_size
        hidden_matrices = trunk.used + trunk.unused - ends + mtp.used + mtp.unused
        moments = 8 * everything - (4 * hidden_matrices if optimizer == "muon" else 0)
        narrow = 4 if precision == "float32" else 2
        rows = min(chunk_rows(self.vocabulary), batch_size * sequence_length)
        return StepMemory(
            weights=4 * everything + (0 if precision == "float32" else 2 * everything),
            gradients=4 * everything,
            optimizer=moments,
            activations=self.activation_bytes(batch_size * sequence_length, precision, recompute),
            logits=rows * self.vocabulary * (4 + narrow) + 4 * ends,
        )
