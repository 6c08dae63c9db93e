"""The one place that calls a softmax attention kernel.

    o = softmax(scale * q k^T + visibility) v

PyTorch's fused kernels want equal head sizes of q, k and v; MLA's differ. Padding v with zeros up to the size of k
and cutting the result is exact and, on a CPU, 4 to 11 times faster than the unfused path. float16 on a CPU is
computed in float32, which is what a tensor core does, and many processors have nothing faster; so is a bfloat16 cache
under float32 hidden states where the processor has no such products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.model.attention.cache import Visibility
from fathom.model.attention.causal import attend_in_blocks, suits
from fathom.model.native.kernels import multiplies_bfloat16
from fathom.model.precision import widen


def attend_plain(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Visibility) -> Tensor:
    """The formula as it stands, in float32: the slow twin of `attend`, with the same arguments."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("btnh,bsnh->bnts", widen(q), widen(k)) * scale
    bias = visible.bias(q.shape[1], k.shape[1], q.device)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return torch.einsum("bnts,bsnv->btnv", weights, widen(v)).to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Visibility) -> Tensor:
    """q (B, T, N, H), k (B, S, N_kv, H), v (B, S, N_kv, V) -> (B, T, N, V); N a multiple of N_kv; k and v of one
    dtype, that of q or a narrower one of a cache."""
    dtype, value_dim = q.dtype, v.shape[-1]
    if suits(q, k, visible.mask is None and visible.causal):
        return attend_in_blocks(q, k, v, scale)
    if k.dtype == torch.bfloat16 != dtype and multiplies_bfloat16():
        q = q.bfloat16()
    elif (dtype == torch.float16 and q.device.type == "cpu") or k.dtype != dtype:
        q, k, v = q.float(), k.float(), v.float()
    if value_dim < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - value_dim))
    elif value_dim > q.shape[-1]:
        widen = value_dim - q.shape[-1]
        q, k = F.pad(q, (0, widen)), F.pad(k, (0, widen))
    groups = q.shape[2] // k.shape[2]
    on_cpu = q.device.type == "cpu"
    if groups > 1 and on_cpu and q.shape[1] == 1:
        return _one_token(q, k, v, scale, visible.mask)[..., :value_dim].to(dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if groups > 1 and on_cpu:
        k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
        groups = 1
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible.mask, is_causal=visible.causal, scale=scale, enable_gqa=groups > 1
    )
    return out.transpose(1, 2)[..., :value_dim].to(dtype)


def _one_token(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The heads of a group as rows of one head, so that no key is copied: q (B, 1, N, H) -> (B, 1, N, V)."""
    rows = q.unflatten(2, (k.shape[2], -1)).squeeze(1)  # (B, N_kv, N / N_kv, H)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if mask is not None:
        mask = mask.expand(-1, -1, rows.shape[2], -1)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.flatten(1, 2).unsqueeze(1)
