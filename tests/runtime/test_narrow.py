"""16 bits on a CPU that cannot multiply them: the results of rounding once, and the range of float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fathom.runtime.narrow import _PRODUCTS, NarrowByFloat


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).half()


class Products(TorchDispatchMode):
    """Notes the dtype of every product that reaches the kernels."""

    def __init__(self, seen: list[torch.dtype]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in _PRODUCTS:
            self.seen.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "mm": (torch.mm, [numbers(5, 7), numbers(7, 3)]),
    "bmm": (torch.bmm, [numbers(2, 5, 7), numbers(2, 7, 3)]),
    "mv": (torch.mv, [numbers(5, 7), numbers(7)]),
    "matmul": (torch.matmul, [numbers(2, 5, 7), numbers(7, 3)]),
    "linear": (F.linear, [numbers(2, 5, 7), numbers(3, 7), numbers(3)]),
    "einsum": (lambda a, b: torch.einsum("bth,bsh->bts", a, b), [numbers(2, 5, 7), numbers(2, 3, 7)]),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_float32_rounded_once(name: str, dtype: torch.dtype) -> None:
    function, inputs = PRODUCTS[name]
    halves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    floats = [x.detach().float().requires_grad_() for x in halves]
    seen: list[torch.dtype] = []
    with Products(seen), NarrowByFloat(dtype):
        out = function(*halves)
        slope = numbers(*out.shape).to(dtype)
        out.backward(slope)
    want = function(*floats)
    want.backward(slope.float())
    assert out.dtype == dtype
    assert torch.equal(out, want.to(dtype))
    assert seen
    assert set(seen) == {torch.float32}  # nothing fell back on PyTorch's own 16-bit product
    for half, full in zip(halves, floats, strict=True):
        assert half.grad is not None
        assert full.grad is not None
        torch.testing.assert_close(half.grad, full.grad.to(dtype), rtol=1e-2, atol=1e-2)


def test_grouped_products() -> None:
    x, w = numbers(8, 16).requires_grad_(), numbers(3, 16, 8).requires_grad_()
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    with NarrowByFloat(torch.float16):
        out = F.grouped_mm(x, w, offs=ends)
        (out * numbers(8, 8)).sum().backward()
    want = torch.cat([x[:3].float() @ w[0].float(), x[3:].float() @ w[2].float()]).half()
    assert torch.equal(out, want)
    assert w.grad is not None
    assert w.grad.dtype == torch.float16
    assert float(w.grad[1].abs().sum()) == 0
    assert float(w.grad[2].abs().sum()) > 0


def test_attention_under_autocast() -> None:
    q = numbers(1, 2, 5, 8).float().requires_grad_()
    with NarrowByFloat(torch.float16):
        with torch.autocast("cpu", dtype=torch.float16):
            out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        out.float().square().sum().backward()
    want = q.detach().clone().requires_grad_()
    exact = F.scaled_dot_product_attention(want, want, want, is_causal=True)
    exact.square().sum().backward()
    torch.testing.assert_close(out.float(), exact, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(q.grad, want.grad, rtol=2e-2, atol=2e-2)


def test_kept_copies_follow_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fathom.runtime.narrow.LARGE", 10)
    a, b = numbers(5, 7), numbers(7, 3)
    with NarrowByFloat(torch.float16):
        for _ in range(3):
            assert torch.equal(a @ b, (a.float() @ b.float()).half())
            assert torch.equal(b.T @ a.T, (b.T.float() @ a.T.float()).half())
            a.mul_(-1.5)  # in place: the copy is out of date
            b = numbers(7, 3) * 2  # a new tensor, perhaps at the old address
        with torch.inference_mode():
            c = a * 2
            assert torch.equal(c @ b, (c.float() @ b.float()).half())


def test_it_overflows_as_float16_does() -> None:
    with NarrowByFloat(torch.float16):
        out = torch.full((1, 4), 200.0).half() @ torch.full((4, 1), 200.0).half()
    assert torch.isinf(out).all()


def test_other_dtypes_pass_untouched() -> None:
    a = torch.randn(3, 5)
    with NarrowByFloat(torch.float16):
        assert torch.equal(a @ a.T, (a @ a.T))
        assert (a.bfloat16() @ a.bfloat16().T).dtype == torch.bfloat16
        assert (a.half() + a.half()).dtype == torch.float16
