"""One new token a row, through all layers in one call: what most of the passes of text generation are.

The same numbers as `Block` after `Block`, each by its kernels; a block that somebody listens to is called as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fathom.model.attention.cache import LayerCache, Visibility
from fathom.model.attention.mla import LATENT_NORM_EPS, MLA
from fathom.model.block import Block
from fathom.model.moe.balance import RoutingReport
from fathom.model.moe.layer import MoE
from fathom.model.native import kernels
from fathom.model.native.kernels import addresses
from fathom.model.native.layers import Layer, Sizes, through
from fathom.model.rope import Rope


def suits(blocks: nn.ModuleList, h: Tensor, visible: Visibility) -> bool:
    """Whether h (B, 1, D) can go through these blocks by `one_token`."""
    return (
        h.shape[1] == 1
        and h.dtype == torch.float32
        and visible.mask is None
        and kernels.few(h, len(h))
        and all(_plain(block) for block in blocks)
    )


def _plain(block: nn.Module) -> bool:
    if not isinstance(block, Block):
        return False
    attention, network = block.self_attn, block.mlp
    return (
        isinstance(attention, MLA)
        and attention.kv_b_proj.weight.dtype == torch.float32
        and not (block.training or block._forward_hooks or block._forward_pre_hooks)
        and not (attention._forward_hooks or attention._forward_pre_hooks)
        and not (network._forward_hooks or network._forward_pre_hooks)
    )


def one_token(
    blocks: nn.ModuleList, h: Tensor, rope: Rope, caches: Sequence[LayerCache], real: Tensor | None
) -> tuple[Tensor, list[RoutingReport]] | None:
    """h (B, 1, D), the embeddings -> (B, 1, D) after the last block, and the reports. None, and nothing is changed: the
    caches have no room for a token that could be written from outside."""
    first = caches[0].room()
    if first is None:
        return None
    rooms = [first]
    for cache in caches[1:]:
        room = cache.room()
        assert room is not None, "caches of one pass are of one kind"
        rooms.append(room)
    known = [block for block in blocks if isinstance(block, Block)]
    layers = [_layer(block, *room) for block, room in zip(known, rooms, strict=True)]
    attention, moes = known[0].self_attn, [block.mlp for block in known if isinstance(block.mlp, MoE)]
    assert isinstance(attention, MLA)
    sizes = Sizes(
        len(h), rooms[0][0].shape[1], h.shape[2],
        attention.q_a_proj.kept[0].shape[0] if attention.low_rank_query else 0, attention.heads, attention.nope,
        attention.rotary, attention.value, attention.latent,
    )  # fmt: skip
    sizes.eps, sizes.latent_eps, sizes.scale = known[0].input_layernorm.eps, LATENT_NORM_EPS, attention.scale
    out, chosen, weights, scores = through(
        layers, sizes, moes[0].gate.choosing if moes else None, len(moes),
        moes[0].config.n_routed_experts if moes else 0,
        attention.o_proj.kept[0].dtype, h, rope.cos, rope.sin,
    )  # fmt: skip
    nothing, none_lost = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    told = zip(moes, chosen, weights, scores, strict=True)
    reports = [RoutingReport(moe.layer, none_lost, nothing, e, w, s, real) for moe, e, w, s in told]
    return out, reports


def _layer(block: Block, c: Tensor, k_rope: Tensor) -> Layer:
    attention, network = block.self_attn, block.mlp
    assert isinstance(attention, MLA)
    low = attention.low_rank_query
    query = attention.q_b_proj if low else attention.q_proj
    shared = network.shared_experts if isinstance(network, MoE) else None
    if isinstance(network, MoE):
        gate_up, down = network.experts.kept
        gate_s, up_s, down_s = (None, None, None) if shared is None else shared.kept
        facts = [
            down[0].shape[2], gate_up[0].shape[0], 0 if gate_s is None else gate_s[0].shape[0],
            network.gate.weight.data_ptr(), network.gate.e_score_correction_bias.data_ptr(),
            *addresses(gate_up, up_s, down, gate_s, down_s),
        ]  # fmt: skip
    else:
        facts = [network.gate_proj.kept[0].shape[0], 0, 0, None, None, *addresses(*network.kept, None, None)]
    return Layer(
        block.input_layernorm.weight.data_ptr(), attention.q_a_layernorm.weight.data_ptr() if low else None,
        attention.kv_a_layernorm.weight.data_ptr(), block.post_attention_layernorm.weight.data_ptr(),
        *addresses(attention.q_a_proj.kept if low else None, query.kept, attention.kv_a_proj_with_mqa.kept),
        attention.kv_b_proj.weight.data_ptr(), *addresses(attention.o_proj.kept), c.data_ptr(), k_rope.data_ptr(),
        c.stride(0), c.stride(1), k_rope.stride(0), k_rope.stride(1), *facts,
    )  # fmt: skip
