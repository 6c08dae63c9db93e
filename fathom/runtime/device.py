"""The device: where tensors live, in which arithmetic matrices are multiplied, and how fast that could go at best.

Weights, gradients and optimizer moments are float32 always; `precision` says what autocast multiplies matrices in.
float16 needs loss scaling (`train/guards.py`). On CPUs without matrix instructions for it, a 16-bit dtype needs
`runtime/narrow.py`, because PyTorch's fallback there is 30 to some hundred times slower than float32.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from fathom.errors import ConfigError
from fathom.knobs import Knobs
from fathom.runtime.memory import keep_memory
from fathom.runtime.narrow import NarrowByFloat

ALIASES = {
    "32": "float32",
    "32-true": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "bf16-mixed": "bfloat16",
    "16": "float16",
    "16-mixed": "float16",
    "fp16": "float16",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense peak FLOP/s of NVIDIA and AMD data sheets: (float16 and bfloat16 with float32 sums, TF32, float32), in 1e12.
# The first that occurs, as words, in the device's own name counts, so longer names stand before their beginnings.
PEAKS: dict[str, tuple[float, float, float]] = {
    "GB200": (2500, 1250, 80),
    "B200": (2250, 1125, 75),
    "H200": (989, 494.7, 67),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 417.5, 60),
    "H100": (989, 494.7, 67),
    "H800": (989, 494.7, 67),
    "H20": (148, 74, 44),
    "GH200": (989, 494.7, 67),
    "A100": (312, 156, 19.5),
    "A800": (312, 156, 19.5),
    "A6000": (154.8, 77.4, 38.7),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165, 82, 10.3),
    "A10G": (70, 35, 31.2),
    "A10": (125, 62.5, 31.2),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "V100": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
    "MI300X": (1307, 653.7, 163.4),
    "MI250X": (383, 47.9, 47.9),
}


def canonical(value: Any) -> Any:
    """The one name of a precision: 16, "fp16" and "16-mixed" are float16, and so on."""
    return ALIASES.get(str(value).lower(), value) if isinstance(value, (int, str)) else value


FILLED = 64  # rows; with 32 and 64 alike AMX ran at its full rate, with any number of rows at a tenth of it
NEW_ROWS = (131, 173, 211, 257, 307, 353, 401, 449, 499, 547, 593, 641)  # primes, so that no run has had them
SMALL = 1 << 22  # active parameters of a model that one thread serves


class HardwareConfig(Knobs):
    """What the machine is asked for."""

    precision: Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(canonical)] = "auto"
    """Arithmetic of matrix products; weights stay float32. auto: bfloat16 where the processor is fast at it, else
    float32. Also 32, fp32, 32-true; bf16, bf16-mixed; 16, fp16, 16-mixed."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a device, else the CPU."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """The largest norm of the gradient of all weights together; null: no clipping."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads for tensors; null: PyTorch's choice (or OMP_NUM_THREADS)."""
    allow_tf32: bool = True
    """Let CUDA multiply float32 matrices in TF32."""
    float8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """A recipe of torchao for the products of attention and dense networks in training, with bfloat16 elsewhere (CUDA
    8.9 and later: H100, L40, RTX 4090); null: none in float8."""
    compile: bool = False
    """torch.compile every block (needs a C++ compiler on CPU)."""
    recompute: bool = False
    """Recompute the activations of every block in the backward pass instead of keeping them."""
    deterministic: bool = False
    """Refuse operations whose result can differ from run to run on CUDA; measured choices are fixed."""
    cuda_memory_fraction: float | None = Field(default=None, gt=0, le=1)
    """The largest share of the device's memory that this process may take."""


@dataclass(frozen=True)
class Device:
    """A device that was set up.

    torch_device       where weights and batches live
    name               of the processor, for people and for `environment.json`
    dtype              of matrix products (autocast's)
    emulates           16-bit products are computed in float32 and rounded (`runtime/narrow.py`)
    peak_flops         FLOP/s of a large matrix product in `dtype`: the 100 % of MFU
    peak_source        table, measured or recorded
    threads            CPU threads
    row_multiple       matrices that change their number of rows from call to call are best filled up to a multiple of
                       it (the experts', in training)
    keeps_memory       the process keeps the memory that it frees (`runtime/memory.py`)
    """

    torch_device: torch.device
    name: str
    dtype: torch.dtype = torch.float32
    emulates: bool = False
    peak_flops: float = 1e11
    peak_source: str = "measured"
    threads: int = 1
    row_multiple: int = 1
    keeps_memory: bool = False

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.torch_device.type

    @property
    def needs_loss_scaling(self) -> bool:
        """float16 gradients underflow without it."""
        return self.dtype == torch.float16

    def autocast(self) -> AbstractContextManager[Any]:
        """Around a forward pass: matrix products in `dtype`, everything delicate in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.kind, dtype=self.dtype)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Around a forward and a backward pass: makes 16 bits usable on CPUs that lack them; nothing elsewhere."""
        return NarrowByFloat(self.dtype) if self.emulates else contextlib.nullcontext()

    def facts(self) -> dict[str, Any]:
        """What `environment.json` records; `set_up(recorded=...)` reads it on resume."""
        return {
            "device": str(self.torch_device),
            "name": self.name,
            "precision": str(self.dtype).removeprefix("torch."),
            "products_in_float32": self.emulates,
            "peak_flops": self.peak_flops,
            "peak_source": self.peak_source,
            "threads": self.threads,
            "row_multiple": self.row_multiple,
            "keeps_memory": self.keeps_memory,
        }


def set_up(config: HardwareConfig, *, recorded: Mapping[str, Any] | None = None, local_rank: int = 0) -> Device:
    """Choose the device, set threads and switches, and find its peak.

    recorded: `Device.facts()` of an earlier session of the run; what was measured then is used again where device,
    precision and threads are the same. Raises ConfigError for an accelerator or precision that this machine does not
    have.
    """
    where = _torch_device(config.accelerator, local_rank)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    if where.type == "cuda":
        torch.cuda.set_device(where)
        if config.cuda_memory_fraction is not None:
            torch.cuda.set_per_process_memory_fraction(config.cuda_memory_fraction, where)
    dtype = _dtype(config.precision, where)
    native = {torch.float16: cpu_has_half, torch.bfloat16: cpu_has_bfloat16}.get(dtype, lambda: True)
    if config.float8 is not None:
        _check_float8(config.float8, dtype, where)
    emulates = where.type == "cpu" and not native()
    if emulates and config.compile:
        raise ConfigError(
            f"hardware.precision is {config.precision} and hardware.compile is true, but this CPU has no matrix "
            "instructions for it, and compiled it would be 30 or more times slower; use float32, or compile: false"
        )
    name = device_name(where)
    device = Device(where, name, dtype, emulates, threads=torch.get_num_threads())
    known = recorded if recorded and _same(device, recorded) else {}
    peak, source = _peak(device, config.allow_tf32, known)
    rows = int(known.get("row_multiple", 0)) or (1 if config.deterministic else _row_multiple(device))
    keeps = where.type == "cpu" and keep_memory()
    return replace(device, peak_flops=peak, peak_source=source, row_multiple=rows, keeps_memory=keeps)


def serving_threads(active: int, most: int) -> int:
    """CPU threads, of at most so many, that serve a model of so many active parameters: 1 for a small one, which
    answers as fast with one, while a second only keeps the API waiting for a core."""
    return 1 if active <= SMALL else most


def _torch_device(accelerator: str, local_rank: int) -> torch.device:
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "hardware.accelerator is cuda, but PyTorch finds no CUDA device here; "
            "use accelerator: auto or cpu, or install a CUDA build of torch"
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"this process is local rank {local_rank}, but the machine has {torch.cuda.device_count()} CUDA devices; "
            "start no more processes a machine than it has devices"
        )
    return torch.device("cuda", local_rank)


def _dtype(precision: str, where: torch.device) -> torch.dtype:
    if where.type == "cpu":
        fast = cpu_has_bfloat16()
    else:
        fast = torch.cuda.get_device_capability(where) >= (8, 0)
        if precision == "bfloat16" and not fast:
            raise ConfigError(
                f"hardware.precision is bfloat16, which {device_name(where)} does not compute; use float16 or float32"
            )
    return (torch.bfloat16 if fast else torch.float32) if precision == "auto" else DTYPES[precision]


def _check_float8(recipe: str, dtype: torch.dtype, where: torch.device) -> None:
    if where.type != "cuda" or torch.cuda.get_device_capability(where) < (8, 9):
        raise ConfigError(
            f"hardware.float8 is {recipe}, which needs CUDA 8.9 or later (H100, L40, RTX 4090), and the device is "
            f"{device_name(where)}; use float8: null"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"hardware.float8 is {recipe}, which goes with bfloat16, and hardware.precision is "
            f"{str(dtype).removeprefix('torch.')}; use precision: bfloat16, or float8: null"
        )


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (amx_bf16, avx512_bf16, or Arm's bf16)."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16") or has.get("bf16"))


def cpu_has_half() -> bool:
    """Whether PyTorch has a fast float16 matrix product for this CPU (amx_fp16 or avx512_fp16, through oneDNN)."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_fp16") or has.get("avx512_fp16"))


def device_name(where: torch.device) -> str:
    """The processor's name as its maker gives it, as far as the system tells."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def tabled_peak(name: str, dtype: torch.dtype, allow_tf32: bool) -> float | None:
    """FLOP/s by data sheet for a GPU's name, or None."""
    for known, (half, tf32, full) in PEAKS.items():
        if re.search(rf"(?<![A-Za-z0-9]){known}(?![A-Za-z0-9])", name):
            return 1e12 * (half if dtype != torch.float32 else tf32 if allow_tf32 else full)
    return None


def _peak(device: Device, allow_tf32: bool, recorded: Mapping[str, Any]) -> tuple[float, str]:
    if device.kind == "cuda":
        tabled = tabled_peak(device.name, device.dtype, allow_tf32)
        if tabled is not None:
            return tabled, "table"
    if recorded.get("peak_flops"):
        return float(recorded["peak_flops"]), "recorded"
    return measure_peak(device), "measured"


def _same(device: Device, recorded: Mapping[str, Any]) -> bool:
    """Whether recorded facts are of a device like this one."""
    facts = device.facts()
    return all(recorded.get(key) == facts[key] for key in ("name", "precision", "threads", "products_in_float32"))


def _row_multiple(device: Device) -> int:
    """FILLED where it is faster, by `new_rows_cost`; only CPUs that multiply 16 bits are asked."""
    if device.kind != "cpu" or device.emulates or device.dtype == torch.float32:
        return 1
    return FILLED if new_rows_cost(device.dtype) > 1.2 else 1


def new_rows_cost(dtype: torch.dtype, counts: Sequence[int] = NEW_ROWS, width: int = 512) -> float:
    """How many times longer products take with numbers of rows not seen before than with these filled up to a multiple
    of FILLED. oneDNN builds a kernel for every new shape: a few percent more rows can be several times faster."""
    weight = torch.ones(width, width, dtype=dtype)

    def seconds(rows: Sequence[int]) -> float:
        start = time.perf_counter()
        for count in rows:
            torch.ones(count, width, dtype=dtype) @ weight
        return time.perf_counter() - start

    filled = [-(-count // FILLED) * FILLED for count in counts]
    seconds(filled)  # these come again and again in a run, so their kernels are there
    return seconds(counts) / seconds(filled)


def measure_peak(device: Device, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of the best of some (size x size) matrix products within about `seconds`."""
    dtype = torch.float32 if device.emulates else device.dtype
    a, b = (torch.ones(size, size, dtype=dtype, device=device.torch_device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    for attempt in range(200):
        start = time.perf_counter()
        a @ b
        if device.kind == "cuda":
            torch.cuda.synchronize(device.torch_device)
        now = time.perf_counter()
        best = min(best, now - start) if attempt else best  # the first one warms up
        if now > end and attempt >= 2:
            break
    return 2 * size**3 / best
