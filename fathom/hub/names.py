"""The one table of tensor names: ours in memory, Hugging Face's on disk, GGUF's.

    | in memory (`Transformer.state_dict()`)   | on disk                                                         |
    |------------------------------------------|-----------------------------------------------------------------|
    | embed_tokens, norm, layers.i.*           | model.embed_tokens, model.norm, model.layers.i.*                |
    | lm_head                                  | lm_head; neither has one when the embedding is the head         |
    | mtp.k.{enorm, hnorm, eh_proj}            | model.layers.{N + k}.{enorm, hnorm, eh_proj}                    |
    | mtp.k.shared_head.norm                   | model.layers.{N + k}.shared_head.norm                           |
    | mtp.k.block.*                            | model.layers.{N + k}.*                                          |
    | *.experts.gate_up_proj (E, 2 I, D)       | *.experts.e.gate_proj.weight, .up_proj.weight      (I, D) each  |
    | *.experts.down_proj (E, D, I)            | *.experts.e.down_proj.weight                       (D, I) each  |

N = num_hidden_layers. Tensors are cut and named, never changed: what is written is read back bit for bit. That is how
released DeepSeek checkpoints are laid out, and what `save_pretrained` writes. GGUF's names follow from those on disk
(`gguf_name`); there the experts of a layer are one tensor again, gate and up apart.

Letters  D model  E experts  I width of one expert
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.errors import CheckpointError
from fathom.model.transformer import ModelConfig, Transformer

Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Names:
    """Two inverse functions between `Transformer.state_dict()` and the tensors on disk."""

    to_disk: Rename
    from_disk: Rename


@dataclass(frozen=True)
class Place:
    """Where a tensor of the disk lies in memory.

    name    the tensor in memory
    expert  its share of a stack of experts, or None: the whole tensor
    half    of that share the first half of the rows (0: gate), the second (1: up), or None: all of it
    """

    name: str
    expert: int | None = None
    half: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The view of a tensor in memory that is one tensor on disk."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.half is None else tensor.chunk(2, dim=0)[self.half]


def blank_state(config: ModelConfig) -> dict[str, Tensor]:
    """The model's state on the device `meta`: names, shapes and dtypes without memory."""
    with torch.device("meta"):
        return Transformer(config).state_dict()


def disk_name(name: str, layers: int) -> str:
    """A name in memory -> its name on disk, experts not yet told apart. layers: num_hidden_layers."""
    if name.startswith("mtp."):
        _, depth, rest = name.split(".", 2)
        return f"model.layers.{layers + int(depth)}.{rest.removeprefix('block.')}"
    return name if name.startswith("lm_head.") else f"model.{name}"


def places(config: ModelConfig, blank: Mapping[str, Tensor] | None = None) -> dict[str, Place]:
    """Every tensor on disk and its place in memory, layer by layer. blank: `blank_state(config)`, if at hand."""
    table = {}
    for name, tensor in (blank_state(config) if blank is None else blank).items():
        disk = disk_name(name, config.num_hidden_layers)
        stack, _, part = disk.rpartition(".")
        if not stack.endswith(".experts"):
            table[disk] = Place(name)
            continue
        for expert in range(tensor.shape[0]):
            if part == "gate_up_proj":
                table[f"{stack}.{expert}.gate_proj.weight"] = Place(name, expert, 0)
                table[f"{stack}.{expert}.up_proj.weight"] = Place(name, expert, 1)
            else:
                table[f"{stack}.{expert}.{part}.weight"] = Place(name, expert)
    return table


def names_of(config: ModelConfig) -> Names:
    """The names of a model's tensors on disk; vocab_size must be known.

    to_disk's tensors are views of the state it is given. from_disk makes new memory for stacks of experts only;
    CheckpointError names the tensors that are missing, not of this model, or of another shape.
    """
    blank = blank_state(config)
    table = places(config, blank)

    def to_disk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {disk: place.of(state[place.name]) for disk, place in table.items()}

    def from_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_names(tensors, table)
        check_shapes({disk: t.shape for disk, t in tensors.items()}, table, blank)
        state: dict[str, Tensor] = {}
        for disk, place in table.items():
            tensor = tensors[disk]
            if place.expert is None:
                state[place.name] = tensor
                continue
            if place.name not in state:
                state[place.name] = torch.empty(blank[place.name].shape, dtype=tensor.dtype, device=tensor.device)
            place.of(state[place.name]).copy_(tensor)
        return state

    return Names(to_disk, from_disk)


def check_names(found: Collection[str], wanted: Collection[str]) -> None:
    """CheckpointError unless the names are the same."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    said = [f"{what} {shown(names)}" for what, names in (("without", missing), ("with unknown", extra)) if names]
    if said:
        raise CheckpointError(
            f"the tensors are of another model than the configuration: {' and '.join(said)}; "
            "give the configuration that they were made with, or the whole set of files"
        )


def check_shapes(found: Mapping[str, torch.Size], table: Mapping[str, Place], blank: Mapping[str, Tensor]) -> None:
    """CheckpointError unless every tensor on disk has the shape of its place."""
    wrong = []
    for disk, shape in found.items():
        wanted = table[disk].of(blank[table[disk].name]).shape
        if shape != wanted:
            wrong.append(f"{disk} is {list(shape)}, not {list(wanted)}")
    if wrong:
        raise CheckpointError(
            f"the tensors do not fit the configuration: {shown(wrong)}; give the configuration that they were made with"
        )


def shown(names: Collection[str], most: int = 3) -> str:
    """The first few of many names."""
    first = ", ".join(list(names)[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"


# --- GGUF ------------------------------------------------------------

# Inside a layer, Hugging Face's name -> GGUF's; Mixtral's and ERNIE's where theirs differ.
GGUF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
    **{f"mlp.{n}_proj.weight": f"ffn_{n}.weight" for n in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{n}_proj.weight": f"ffn_{n}_shexp.weight" for n in ("gate", "up", "down")},
}
GGUF_EXPERT = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
GGUF_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """A name on disk -> GGUF's; of one expert, that of the stack it belongs to."""
    if name in GGUF_OUTSIDE:
        return GGUF_OUTSIDE[name]
    _, _, layer, part = name.split(".", 3)
    if ".experts." in part:
        return f"blk.{layer}.ffn_{GGUF_EXPERT[part.split('.')[-2]]}_exps.weight"
    return f"blk.{layer}.{GGUF_LAYER[part]}"
