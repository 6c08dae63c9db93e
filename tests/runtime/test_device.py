"""The device: names of precisions, choices, peaks that are recorded and used again."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from fathom.errors import ConfigError
from fathom.runtime import device as rooms
from fathom.runtime.device import DTYPES, Device, HardwareConfig, set_up, tabled_peak


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *[(typed, "float16") for typed in ("16-mixed", 16, "16", "fp16", "float16")],
        *[(typed, "bfloat16") for typed in ("bf16", "bf16-mixed", "bfloat16")],
        *[(typed, "float32") for typed in (32, "32", "32-true", "FP32", "float32")],
        ("auto", "auto"),
    ],
)
def test_precision_has_one_name(typed: str | int, meant: str) -> None:
    assert HardwareConfig(precision=typed).precision == meant


@pytest.mark.parametrize("typed", ["fp8", 64, True, None, 1.5, ["bf16"]])
def test_other_precisions_are_refused(typed: object) -> None:
    with pytest.raises(ValidationError):
        HardwareConfig(precision=typed)


@pytest.fixture
def slow_peak(monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """Counts measurements, and makes them free."""
    seen: list[Device] = []

    def measure(device: Device) -> float:
        seen.append(device)
        return 5e9

    monkeypatch.setattr(rooms, "measure_peak", measure)
    return seen


def test_a_recorded_peak_is_used_again_only_where_it_was_measured(slow_peak: list[Device]) -> None:
    config = HardwareConfig(precision="float32", accelerator="cpu")
    first = set_up(config)
    assert (first.peak_flops, first.peak_source, len(slow_peak)) == (5e9, "measured", 1)
    facts = {**first.facts(), "peak_flops": 7e9}
    again = set_up(config, recorded=facts)
    assert (again.peak_flops, again.peak_source, len(slow_peak)) == (7e9, "recorded", 1)
    assert set_up(config, recorded={**facts, "threads": 999}).peak_source == "measured"
    assert set_up(HardwareConfig(precision="bfloat16", accelerator="cpu"), recorded=facts).peak_source == "measured"


@pytest.mark.parametrize(("cost", "deterministic", "wanted"), [(9.0, False, 64), (1.1, False, 1), (9.0, True, 1)])
def test_rows_are_filled_up_where_that_is_faster(
    cost: float, deterministic: bool, wanted: int, slow_peak: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(rooms, "new_rows_cost", lambda dtype: cost)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    config = HardwareConfig(precision="bfloat16", accelerator="cpu", deterministic=deterministic)
    device = set_up(config)
    assert device.row_multiple == wanted
    assert set_up(config, recorded={**device.facts(), "row_multiple": 32}).row_multiple == 32
    assert set_up(HardwareConfig(precision="float32", accelerator="cpu")).row_multiple == 1


def test_the_cost_of_new_rows_is_a_ratio_of_times() -> None:
    assert 0.01 < rooms.new_rows_cost(torch.float32, counts=(3, 5, 7), width=16) < 100


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_only_where_it_is_fast(
    fast: bool, dtype: torch.dtype, slow_peak: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "cpu_has_bfloat16", lambda: fast)
    assert set_up(HardwareConfig(accelerator="cpu")).dtype == dtype


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("native", [True, False])
def test_16_bits_are_emulated_only_where_they_are_missing(
    native: bool, precision: str, slow_peak: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, {"float16": "cpu_has_half", "bfloat16": "cpu_has_bfloat16"}[precision], lambda: native)
    device = set_up(HardwareConfig.model_validate({"accelerator": "cpu", "precision": precision}))
    assert device.emulates is not native
    assert device.needs_loss_scaling is (precision == "float16")
    if not native:
        with pytest.raises(ConfigError, match="compile"):
            set_up(HardwareConfig.model_validate({"accelerator": "cpu", "precision": precision, "compile": True}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        set_up(HardwareConfig(accelerator="cuda"))


@pytest.mark.parametrize("precision", DTYPES)
def test_autocast_multiplies_in_its_dtype_and_weights_stay_float32(precision: str) -> None:
    device = Device(torch.device("cpu"), "x", DTYPES[precision], precision != "float32")
    layer = torch.nn.Linear(3, 5)
    with device.arithmetic():
        with device.autocast():
            out = layer(torch.ones(2, 3))
        out.float().sum().backward()
    assert out.dtype == DTYPES[precision]
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
    ],
)
def test_the_table_knows_its_names(name: str, half: float) -> None:
    assert tabled_peak(name, torch.bfloat16, True) == half * 1e12


def test_every_name_of_the_table_is_reached_and_no_other() -> None:
    for name, (half, tf32, full) in rooms.PEAKS.items():
        known = [tabled_peak(f"NVIDIA {name} 80GB", d, t) for d, t in ((torch.float16, True), (torch.float32, True))]
        assert known == [half * 1e12, tf32 * 1e12], name
        assert tabled_peak(f"NVIDIA {name}", torch.float32, False) == full * 1e12
    for name in ("NVIDIA RTX A4000", "Quadro T400", "Some Other Card"):
        assert tabled_peak(name, torch.float32, True) is None


def test_the_measured_peak_is_a_speed() -> None:
    device = Device(torch.device("cpu"), "x")
    peak = rooms.measure_peak(device, size=128, seconds=0.01)
    assert 1e8 < peak < 1e14


@pytest.mark.parametrize(
    ("capability", "precision", "words"),
    [
        (None, "auto", r"hardware\.float8 is rowwise, which needs CUDA 8\.9 or later .*use float8: null"),
        ((8, 0), "bfloat16", r"needs CUDA 8\.9"),
        ((9, 0), "float32", r"goes with bfloat16, and hardware\.precision is float32"),
    ],
)
def test_float8_is_refused_where_it_cannot_be(
    capability: tuple[int, int] | None, precision: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if capability is not None:
        monkeypatch.setattr(rooms, "_torch_device", lambda *_: torch.device("cuda", 0))
        monkeypatch.setattr(rooms, "device_name", lambda _: "a card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with pytest.raises(ConfigError, match=words):
        set_up(HardwareConfig(float8="rowwise", precision=precision, accelerator="auto"))


def test_a_small_model_is_served_by_one_thread() -> None:
    assert [rooms.serving_threads(active, 7) for active in (1, 1 << 22, (1 << 22) + 1)] == [1, 1, 7]
