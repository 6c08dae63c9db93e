"""One new token a row, through all layers in one call: what most of the passes of text generation are.

The same numbers as `Block` after `Block`, each by its kernels. Blocks go this way if they are Fathom's own, all alike,
their weights kept in one way, and nobody listens to what is called there: a block, its attention, network and norms.
Where the weights lie is found once, and looked at again in every pass: with a part or a number replaced, moved or
listened to, it is found anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from fathom.model.attention.cache import LayerCache
from fathom.model.attention.mla import LATENT_NORM_EPS, MLA
from fathom.model.block import Block
from fathom.model.feedforward import FeedForward
from fathom.model.moe.balance import RoutingReport
from fathom.model.moe.layer import MoE
from fathom.model.native import kernels
from fathom.model.native.kernels import KINDS, Kept
from fathom.model.native.layers import Layer, Sizes, through
from fathom.model.norm import RMSNorm
from fathom.model.rope import Rope

Watched = tuple[dict[str, Any], str, Any]
"""A dictionary, a key, and what must be there."""


class OneToken:
    """The layers of one model. A copy of it knows nothing."""

    def __init__(self) -> None:
        self._found: _Found | None = None

    def __reduce__(self) -> tuple[type[OneToken], tuple[()]]:
        return OneToken, ()

    def __call__(
        self, blocks: nn.ModuleList, h: Tensor, rope: Rope, caches: Sequence[LayerCache], real: Tensor | None
    ) -> tuple[Tensor, list[RoutingReport]] | None:
        """h (B, 1, D), the embeddings -> (B, 1, D) after the last block, and the reports. None, and nothing is changed:
        they cannot go this way."""
        if h.shape[1] != 1 or not kernels.few(h, len(h)):
            return None
        found = self._found
        if found is None or not found.stands(blocks):
            found = self._found = _Found(blocks) if _plain(blocks) else None
            if found is None:
                return None
        where = caches[0].where()
        if where is None:
            return None
        out, chosen, weights, scores = through(
            found.layers, found.sizes, len(found.moes), found.experts, h, rope.cos, rope.sin,
            [cache.memory for cache in caches], where,
        )  # fmt: skip
        for cache in caches:
            cache.grow()
        nothing, none_lost = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        told = zip(found.moes, chosen.unbind(), weights.unbind(), scores.unbind(), strict=True)
        return out, [RoutingReport(moe.layer, none_lost, nothing, e, w, s, real) for moe, e, w, s in told]


def _plain(blocks: nn.ModuleList) -> bool:
    """Whether blocks are what they were made as, all alike, and nobody listens."""
    if not all(type(block) is Block and type(block.self_attn) is MLA for block in blocks):
        return False
    if any(_listeners(blocks)) or any(not _own(part) for part in blocks.modules() if part is not blocks):
        return False
    known = [block for block in blocks if isinstance(block, Block)]
    attentions = [block.self_attn for block in known if isinstance(block.self_attn, MLA)]
    gates = [block.mlp.gate for block in known if isinstance(block.mlp, MoE)]
    norms = [part for part in blocks.modules() if isinstance(part, RMSNorm)]
    groups: list[list[Kept]] = [
        [kept for block in known for kept in _of_network(block.mlp).values()]
        + [kept for attention in attentions for kept in attention.kept.values()],
        [(attention.kv_b_proj.weight, None) for attention in attentions],
        [(norm.weight, None) for norm in norms],
        [(gate.weight, None) for gate in gates],
    ]
    return (
        all(kernels.alike(*group) for group in groups if group)
        and all(gate.e_score_correction_bias.dtype == torch.float32 for gate in gates)
        and len({_numbers(block) for block in known}) == 1
        and len({(gate.choosing, len(gate.weight)) for gate in gates}) <= 1
    )


def _own(part: nn.Module) -> bool:
    """Whether a part is Fathom's own and does what its class does."""
    return type(part).__module__.startswith("fathom.model") and "forward" not in vars(part) and not part.training


def _numbers(block: Block) -> tuple[float, ...]:
    """What must be the same in all blocks."""
    attention = block.self_attn
    assert isinstance(attention, MLA)
    return (
        block.input_layernorm.eps, block.post_attention_layernorm.eps - block.input_layernorm.eps, attention.heads,
        attention.nope, attention.rotary, attention.value, attention.latent, attention.scale,
        attention.q_a_proj.kept[0].shape[0] if attention.low_rank_query else 0,
    )  # fmt: skip


def _listeners(blocks: nn.ModuleList) -> Iterator[dict[int, Any]]:
    """Where hooks would be: of the modules that are called one by one, and of all modules there are."""
    yield from (_global_forward_hooks, _global_forward_pre_hooks)
    for block in blocks:
        assert isinstance(block, Block)
        for part in (block, block.self_attn, block.mlp, block.input_layernorm, block.post_attention_layernorm):
            yield part._forward_hooks
            yield part._forward_pre_hooks


def _of_network(network: MoE | FeedForward) -> dict[str, Kept]:
    """Its matrices by their names in `Layer`."""
    if not isinstance(network, MoE):
        return dict(zip(("gate", "up", "down"), network.kept, strict=True))
    found = dict(zip(("gate", "down"), network.experts.kept, strict=True))
    if network.shared_experts is not None:
        found |= zip(("shared_gate", "up", "shared_down"), network.shared_experts.kept, strict=True)
    return found


class _Found:
    """Where the weights of plain blocks lie, and how to see that they still lie there."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        known = [block for block in blocks if isinstance(block, Block)]
        self.tensors: list[Tensor] = []
        self.moes = [block.mlp for block in known if isinstance(block.mlp, MoE)]
        self.experts = self.moes[0].config.n_routed_experts if self.moes else 0
        self.layers = (Layer * len(known))(*map(self._layer, known))
        self.sizes = self._sizes(known[0])
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.blocks = known
        self.listeners = list(_listeners(blocks))
        self.watched = [seen for part in blocks.modules() for seen in _watched(part)]
        places = [place for part in blocks.modules() for place in (vars(part), part._modules)]
        self.counts = [(place, len(place)) for place in places]

    def stands(self, blocks: nn.ModuleList) -> bool:
        """Whether all that was found is still there, and nobody has come to listen."""
        return (
            len(blocks) == len(self.blocks)
            and all(block is known for block, known in zip(blocks, self.blocks, strict=True))
            and not any(self.listeners)
            and all(place.get(name) is part for place, name, part in self.watched)
            and all(len(place) == count for place, count in self.counts)
            and [tensor.data_ptr() for tensor in self.tensors] == self.addresses
        )

    def _address(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, name: str, kept: Kept) -> dict[str, int]:
        found = {name: kept[0], f"{name}_scales": kept[1]}
        return {key: self._address(tensor) for key, tensor in found.items() if tensor is not None}

    def _layer(self, block: Block) -> Layer:
        attention, network = block.self_attn, block.mlp
        assert isinstance(attention, MLA)
        norms = {"norm": block.input_layernorm, "norm_after": block.post_attention_layernorm}
        norms["kv_a_norm"] = attention.kv_a_layernorm
        matrices = {**attention.kept, **_of_network(network)}
        if attention.low_rank_query:
            norms["q_a_norm"] = attention.q_a_layernorm
        facts = {name: self._address(norm.weight) for name, norm in norms.items()}
        facts["kv_b"] = self._address(attention.kv_b_proj.weight)
        for name, kept in matrices.items():
            facts |= self._matrix(name, kept)
        if isinstance(network, MoE):
            facts["router"] = self._address(network.gate.weight)
            facts["bias"] = self._address(network.gate.e_score_correction_bias)
            facts |= {"inner": matrices["down"][0].shape[2], "experts": network.config.n_routed_experts}
            facts["shared"] = matrices["up"][0].shape[0] if "up" in matrices else 0
        else:
            facts["inner"] = matrices["gate"][0].shape[0]
        return Layer(**facts)

    def _sizes(self, first: Block) -> Sizes:
        attention = first.self_attn
        assert isinstance(attention, MLA)
        sizes = Sizes(
            D=first.input_layernorm.weight.shape[0], N=attention.heads, H=attention.nope, R=attention.rotary,
            V=attention.value, C=attention.latent, eps=first.input_layernorm.eps, latent_eps=LATENT_NORM_EPS,
            scale=attention.scale, kind=KINDS[attention.o_proj.kept[0].dtype],
            norm_kind=KINDS[first.input_layernorm.weight.dtype], kv_b_kind=KINDS[attention.kv_b_proj.weight.dtype],
        )  # fmt: skip
        if attention.low_rank_query:
            sizes.L = attention.q_a_proj.kept[0].shape[0]
        if self.moes:
            gate = self.moes[0].gate
            sizes.router_kind = KINDS[gate.weight.dtype]
            sizes.k, sizes.sigmoid, sizes.normalised, sizes.weight_scale = gate.choosing[:4]
            sizes.groups, sizes.kept_groups, sizes.best_two = gate.choosing[4:]
        return sizes


def _watched(part: nn.Module) -> Iterator[Watched]:
    """Parts, weights and numbers of a module."""
    for place in (part._modules, part._parameters, part._buffers):
        yield from ((place, name, kept) for name, kept in place.items())
    own = vars(part)
    if "kept" in own:
        yield own, "kept", own["kept"]
    if not isinstance(part, nn.Linear):
        yield from ((own, name, value) for name, value in own.items() if isinstance(value, int | float | str))
