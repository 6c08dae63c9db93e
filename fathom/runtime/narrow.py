"""16-bit numbers on CPUs that cannot multiply them: products computed in float32 and rounded to float16 or bfloat16.

That is what a GPU's tensor cores do too (16 bits in, float32 sums, 16 bits out), so a float16 run on a laptop behaves
like one on a GPU: it overflows at 65,504 and needs loss scaling. PyTorch's own fallback is right as well, but 30 to
some hundred times slower than float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

LARGE = 1 << 22  # elements of a matrix whose float32 copy is worth keeping


class NarrowByFloat(TorchDispatchMode):
    """A context: products and attention of CPU tensors of one 16-bit dtype run in float32, forward and backward, and
    their results are rounded once. Everything else passes untouched."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # The last two large matrices with their float32 copies: a head that works in chunks of tokens multiplies the
        # same matrix again and again, and converting it each time is slow.
        self._kept: list[tuple[Any, Tensor, Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket not in _PRODUCTS or not any(self._is_narrow(a) for a in args):
            return function(*args, **kwargs)
        if kwargs.get("out_dtype") is self.dtype:
            kwargs = {**kwargs, "out_dtype": None}
        wide = [self._wide(a) if self._is_narrow(a) else a for a in args]
        out = function(*wide, **{k: v.float() if self._is_narrow(v) else v for k, v in kwargs.items()})
        if isinstance(out, Tensor):
            return out.to(self.dtype)
        # attention gives (output, logsumexp), and the logsumexp is float32 by right; its backward gives three gradients
        keep = function.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu
        return tuple(
            o if not isinstance(o, Tensor) or (keep and i > 0) else o.to(self.dtype) for i, o in enumerate(out)
        )

    def _is_narrow(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == self.dtype and value.device.type == "cpu"

    def _wide(self, narrow: Tensor) -> Tensor:
        """A float32 copy, taken from those kept if the tensor has not changed since. Holding the tensor keeps its
        address from being given to another."""
        if narrow.numel() < LARGE or narrow.ndim != 2 or narrow.is_inference():
            return narrow.float()
        turned = not narrow.is_contiguous()
        base = narrow.mT if turned else narrow
        key = (base.data_ptr(), base.shape, base.stride(), base._version)
        found = next((entry for entry in self._kept if entry[0] == key), None)
        if found is None:
            found = (key, base, base.float())
        others = [entry for entry in self._kept if entry is not found]
        self._kept = [*others[-1:], found]
        return found[2].mT if turned else found[2]


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
