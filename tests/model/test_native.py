"""The compiled kernels beside their slow twins, and what happens where nothing can be compiled."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import close, seeded, tiny_model, tokens_of
from torch import Tensor

from fathom.generate.cache import caches_for
from fathom.model.feedforward import swiglu_plain
from fathom.model.moe.layer import MoE, MoEConfig
from fathom.model.native import build, kernels
from fathom.model.norm import rms_norm_plain
from fathom.model.quantize import quantize_int8, quantized, rebuilt
from fathom.model.transformer import Transformer

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 2e-6


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets them, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- products ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 19),
    width=st.sampled_from([1, 7, 16, 31, 64, 67, 2048, 2061]),
    height=st.integers(1, 21),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_a_product_is_linear(rows: int, width: int, height: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = seeded(rows, width, seed=seed), seeded(height, width, seed=seed + 1).to(dtype)
    y = kernels.product(x, weight)
    assert y.dtype == torch.float32
    x, weight = x.double(), weight.double()
    assert ((y - F.linear(x, weight)).abs() <= EPS * F.linear(x.abs(), weight.abs())).all()


def test_only_float32_is_taken() -> None:
    with pytest.raises(TypeError, match=r"bfloat16, and the kernels take float32"):
        kernels.product(seeded(2, 8).bfloat16(), seeded(3, 8))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.sampled_from([1, 7, 32, 67, 2048, 2061, 4099]),
    height=st.integers(1, 21),
    outlier=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_a_product_with_int8_is_right_to_16_bits(rows: int, width: int, height: int, outlier: float, seed: int) -> None:
    x, (q, scales) = seeded(rows, width, seed=seed), quantized(seeded(height, width, seed=seed + 1))
    x[:, 0] *= outlier
    y = kernels.product(x, q, scales)
    most = x.abs().amax(-1, keepdim=True) / 65_534 * rebuilt(q, scales).double().abs().sum(-1)
    exact = x.double() @ rebuilt(q, scales).double().T
    assert ((y - exact).abs() <= most + 3e-6 * exact.abs().max()).all()


def test_the_largest_whole_numbers_do_not_overflow() -> None:
    q, scales, x = torch.full((5, 4096), 127, dtype=torch.int8), torch.ones(5), torch.full((3, 4096), 3.0)
    for sign in (1, -1):
        torch.testing.assert_close(kernels.product(sign * x, q, scales), sign * x @ q.float().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    weight, scales = seeded(37, 83), None
    if kind == "int8":
        weight, scales = quantized(weight)
    elif kind == "bfloat16":
        weight = weight.bfloat16()
    x = seeded(19, 83, seed=1)
    together = kernels.product(x, weight, scales)
    for count in range(1, 20):
        assert torch.equal(kernels.product(x[:count], weight, scales), together[:count])
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, 0.0
    broken = kernels.product(x, weight, scales)
    assert not broken[:2].isfinite().any()
    assert not broken[2].any()
    assert torch.equal(broken[3:], together[3:])


def test_numbers_too_small_to_be_inverted_are_zero() -> None:
    q, scales = quantized(seeded(3, 8))
    assert not kernels.product(torch.full((1, 8), 1e-39), q, scales).any()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_threads_share_the_work_and_change_nothing(count: int, kind: str, threads: Callable[[int], None]) -> None:
    model = wide_model(kind)
    tokens = tokens_of(3, 9)

    def everything() -> list[Tensor]:
        with torch.no_grad():
            caches = caches_for(model.config, 2, 3, 9, torch.float32 if kind == "int8" else dtype_of(kind), "cpu")
            return [model(part, caches=caches) for part in tokens.split([6, 1, 2], 1)]

    alone = everything()
    threads(count)
    for one, several in zip(alone, everything(), strict=True):
        assert torch.equal(one, several)


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind == "bfloat16" else torch.float32


def wide_model(kind: str) -> Transformer:
    """Large enough for a second thread to be woken."""
    attention = {"kind": "mla", "num_attention_heads": 5, "q_lora_rank": 72, "kv_lora_rank": 96,
                 "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 40}  # fmt: skip
    moe = {"n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 47, "n_shared_experts": 1,
           "first_k_dense_replace": 1, "scoring_func": "sigmoid"}  # fmt: skip
    model = tiny_model(attention, moe, 0, hidden_size=256, intermediate_size=200, initializer_range=0.05).eval()
    return quantize_int8(model) if kind == "int8" else model.to(dtype_of(kind))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("moe", ["dense", "v2", "v3", "eager"])
def test_a_row_is_the_same_alone_and_in_a_batch(kind: str, moe: str) -> None:
    """The whole model, token by token: the kernels' sums run in one order whatever is beside them."""
    model = tiny_model("mla_low_rank", moe).eval()
    model = quantize_int8(model) if kind == "int8" else model.to(dtype_of(kind))
    tokens, dtype = tokens_of(7, 5), torch.float32 if kind == "int8" else dtype_of(kind)

    def answer(rows: Tensor) -> Tensor:
        caches = caches_for(model.config, 2, len(rows), 5, dtype, "cpu")
        return torch.cat([model(part, caches=caches) for part in rows.split(1, 1)], 1)

    with torch.no_grad():
        together = answer(tokens)
        assert torch.equal(torch.cat([answer(row) for row in tokens.split(1)]), together)


# --- networks ----------------------------------------------------------------


def plain_network(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, up, down = gate.double(), up.double(), down.double()
    return F.linear(swiglu_plain(F.linear(x.double(), gate), F.linear(x.double(), up)), down)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), outer=st.integers(1, 40), inner=st.integers(1, 40), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_network_is_swiglu(rows: int, outer: int, inner: int, dtype: torch.dtype, seed: int) -> None:
    x = seeded(rows, outer, seed=seed)
    gate, up = (seeded(inner, outer, seed=seed + n).to(dtype) for n in (1, 2))
    down = seeded(outer, inner, seed=seed + 3).to(dtype)
    y = kernels.network(x, (gate, None), (up, None), (down, None))
    assert close(y.double(), plain_network(x, gate, up, down), 10 * EPS)


# --- mixtures ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), k=st.integers(1, 4), groups=st.sampled_from([1, 2, 4]),
    scoring=st.sampled_from(["softmax", "sigmoid"]), method=st.sampled_from(["group_limited_greedy", "noaux_tc"]),
    norm=st.booleans(), shared=st.integers(0, 2), width=st.integers(1, 40), inner=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_mixture_is_the_layer(
    rows: int, k: int, groups: int, scoring: str, method: str, norm: bool, shared: int, width: int, inner: int,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    config = MoEConfig.model_validate({
        "n_routed_experts": 12, "num_experts_per_tok": k, "n_group": groups, "topk_group": max(1, groups - 1) if
        k <= 12 // groups * max(1, groups - 1) else groups, "scoring_func": scoring, "topk_method": method,
        "norm_topk_prob": norm, "routed_scaling_factor": 1.7, "n_shared_experts": shared,
        "moe_intermediate_size": inner, "experts_implementation": "eager",
    })  # fmt: skip
    moe = MoE(config, width, 0).eval()
    for number, weight in enumerate(moe.parameters()):
        weight.data.copy_(seeded(*weight.shape, seed=seed + number) * 0.3)
    moe.gate.e_score_correction_bias.copy_(seeded(12, seed=seed + 50) * 0.3)
    moe, x = moe.to(dtype), seeded(1, rows, width, seed=seed + 60)
    want, told = moe.float()(x)  # gradients are recorded: the formula
    moe = moe.to(dtype)
    with torch.no_grad():
        assert moe.experts.takes(x[0], k)
        got, report = moe(x)
    assert got.dtype == torch.float32
    assert torch.equal(report.experts, told.experts)
    torch.testing.assert_close(report.weights, told.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(report.scores, told.scores, rtol=1e-4, atol=1e-5)
    assert close(got, want, 3e-5)


# --- norms ----------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 67), scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_norm_is_the_formula(width: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    x, weight = seeded(2, 3, 2 * width, seed=seed)[..., ::2] * scale, seeded(width, seed=seed + 1).to(dtype)
    got = kernels.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got, rms_norm_plain(x, weight, 1e-5), rtol=2 * EPS, atol=1e-6)


# --- compiling ----------------------------------------------------------------


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is looked for again, and again after the test."""
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.usefixtures("anew")
def test_without_a_compiler_pytorch_does_everything(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokens = tiny_model("mla_low_rank", "v3").eval(), tokens_of(2, 7)
    with torch.no_grad():
        fast = model(tokens)
        build.library.cache_clear()
        monkeypatch.setenv("CXX", "")
        with caplog.at_level(logging.INFO, "fathom"):
            slow = model(tokens)
    assert close(fast, slow)
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "echo"])
def test_a_compiler_that_fails_is_named_once(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("FATHOM_CACHE", str(tmp_path))
    assert build.library() is None
    assert build.library() is None
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]
    assert f"could not be compiled by {compiler}" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("anew")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FATHOM_CACHE", str(tmp_path / "file"))
    assert build.library() is None


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    made = build.compiled(compiler, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "lock"] == [".so"]
    run = subprocess.run

    def only_asks(command: list[str], **keys: object) -> object:
        assert command[-1] == "--version"
        return run(command, **keys)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", only_asks)
    assert build.compiled(compiler, tmp_path) == made
