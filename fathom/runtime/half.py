"""float16 on CPUs that cannot: matrix products of float16 numbers, computed in float32 and rounded to float16.

That is what a GPU's tensor cores do too (float16 in, float32 sums, float16 out), so a float16 run on a laptop behaves
like one on a GPU: it overflows at 65,504 and needs loss scaling. PyTorch's own fallback is right as well, but some
hundred times slower than float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

LARGE = 1 << 22  # elements of a matrix whose float32 copy is worth keeping


class HalfByFloat(TorchDispatchMode):
    """A context: products and attention of float16 CPU tensors run in float32, forward and backward, and their float16
    results are rounded once. Everything else passes untouched."""

    def __init__(self) -> None:
        super().__init__()
        # The last two large matrices with their float32 copies: a head that works in chunks of tokens multiplies the
        # same matrix again and again, and converting it each time is slow.
        self._kept: list[tuple[Any, Tensor, Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket not in _PRODUCTS or not any(_is_half(a) for a in args):
            return function(*args, **kwargs)
        if kwargs.get("out_dtype") is torch.float16:
            kwargs = {**kwargs, "out_dtype": None}
        wide = [self._wide(a) if _is_half(a) else a for a in args]
        out = function(*wide, **{k: v.float() if _is_half(v) else v for k, v in kwargs.items()})
        if isinstance(out, Tensor):
            return out.half()
        # attention gives (output, logsumexp), and the logsumexp is float32 by right; its backward gives three gradients
        keep = function.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu
        return tuple(o if not isinstance(o, Tensor) or (keep and i > 0) else o.half() for i, o in enumerate(out))

    def _wide(self, half: Tensor) -> Tensor:
        """A float32 copy, taken from those kept if the tensor has not changed since. Holding the tensor keeps its
        address from being given to another."""
        if half.numel() < LARGE or half.ndim != 2 or half.is_inference():
            return half.float()
        turned = not half.is_contiguous()
        base = half.mT if turned else half
        key = (base.data_ptr(), base.shape, base.stride(), base._version)
        found = next((entry for entry in self._kept if entry[0] == key), None)
        if found is None:
            found = (key, base, base.float())
        others = [entry for entry in self._kept if entry is not found]
        self._kept = [*others[-1:], found]
        return found[2].mT if turned else found[2]


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float16 and value.device.type == "cpu"


_PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.mv,
    aten.addmv,
    aten.dot,
    aten._grouped_mm,
    aten.linear,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
