"""Safetensors in pieces: read and written tensor by tensor, so that memory never holds more than one of them.

    model.safetensors                                     one file, or
    model-00001-of-0000N.safetensors ...                  many,
    model.safetensors.index.json                          and which of them has which tensor

Pickled weights (.bin, .pt) are never opened: reading one runs whatever code it holds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fathom.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Spec(NamedTuple):
    """What a tensor is before its numbers are known."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when asked for.

    Opening reads every file's header and no numbers. CheckpointError: no weights, pickled weights, a file that is
    missing, cut short or no safetensors, or an index that its files do not bear out.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._file: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None  # one file at a time
        promised = self._index() if (self.folder / INDEX).is_file() else None
        names = sorted(set(promised.values())) if promised is not None else [self._only()]
        for file in names:
            self._read_header(file)
        if promised is not None and promised != self._file:
            wrong = sorted(name for name in {**promised, **self._file} if promised.get(name) != self._file.get(name))
            raise CheckpointError(
                f"{self.folder / INDEX} does not fit the files beside it, for instance at {wrong[0]}; "
                "copy the whole folder again"
            )

    def _only(self) -> str:
        if (self.folder / SINGLE).is_file():
            return SINGLE
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; give the folder that holds config.json and {SINGLE}")
        pickled = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{self.folder} has only pickled weights ({pickled[0]}), and reading those runs whatever code is in "
                "them; save the model as safetensors where it is trusted (save_pretrained does), and give that folder"
            )
        raise CheckpointError(f"{self.folder} has no weights: neither {SINGLE} nor {INDEX} is there")

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            pairs = {str(name): str(file) for name, file in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no index of shards ({error}); copy it again") from error
        for file in set(pairs.values()):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{path} names {file}; a shard is a .safetensors file of the same folder")
        return pairs

    def _read_header(self, file: str) -> None:
        with self._opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - no dict
                if name in self._file:
                    raise CheckpointError(f"{self.folder}: {name} is in {self._file[name]} and in {file}")
                self._file[name] = file
                part = handle.get_slice(name)
                self._shape[name], self._dtype[name] = tuple(part.get_shape()), str(part.get_dtype())

    def _opened(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{self.folder} is incomplete: {file} is missing; copy it again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is cut short or no safetensors file ({str(error).splitlines()[0]}); copy it again"
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._shape[name]

    def dtype(self, name: str) -> str:
        """Its dtype in the words of safetensors (F32, BF16, F8_E4M3, ...), without reading it."""
        return self._dtype[name]

    def __getitem__(self, name: str) -> Tensor:
        file = self._file[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, self._opened(file))
        return self._open[1].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __len__(self) -> int:
        return len(self._file)


@dataclass
class File:
    """A safetensors file while it is being written: the header first, then tensors in any order.

    The format: 8 bytes of length, a JSON header of that length, the numbers. The `safetensors` package writes a file
    from a dict that is whole in memory; this one needs a tensor at a time.
    """

    stream: BinaryIO
    specs: Mapping[str, Spec]
    starts: dict[str, int]

    @classmethod
    def begin(cls, stream: BinaryIO, specs: Mapping[str, Spec]) -> File:
        """Write the header. Wide numbers come first, so that each tensor is aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at, offsets = 0, {}
        for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            offsets[name] = at
            header[name] = {
                "dtype": DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.bytes],
            }
            at += spec.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream.write(len(text).to_bytes(8, "little") + text)
        base = 8 + len(text)
        return cls(stream, specs, {name: base + offset for name, offset in offsets.items()})

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        if (tensor.dtype, tuple(tensor.shape)) != self.specs[name]:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced as {self.specs[name]}")
        self.stream.seek(self.starts.pop(name))
        flat = tensor.detach().cpu().contiguous().flatten()
        self.stream.write(flat.view(torch.uint8).numpy().tobytes())

    def end(self) -> None:
        """See that every announced tensor came, and bring the file to the disk."""
        if self.starts:
            raise ValueError(f"announced and never written: {sorted(self.starts)[:3]}")
        self.stream.flush()
        os.fsync(self.stream.fileno())


def planned(specs: Mapping[str, Spec], most: int) -> dict[str, list[str]]:
    """File -> names, in order; a file has at most `most` bytes, or one tensor that is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def write_shards(
    folder: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]], most: int = 5 * 10**9
) -> list[str]:
    """Write tensors, which come in the order of specs, into one file or into shards with their index.

    most: bytes of a shard. Returns the names of the files. OSError: the disk refuses.
    """
    plan = planned(specs, most)
    stream = iter(tensors)
    for file, names in plan.items():
        with (folder / file).open("wb") as handle:
            shard = File.begin(handle, {name: specs[name] for name in names})
            for expected in names:
                name, tensor = next(stream)
                if name != expected:
                    raise ValueError(f"{name} came where {expected} was announced")
                shard.put(name, tensor)
            shard.end()
    with suppress(StopIteration):
        name, _ = next(stream)
        raise ValueError(f"{name} was never announced")
    if len(plan) == 1:
        return list(plan)
    index = {
        "metadata": {"total_size": sum(spec.bytes for spec in specs.values())},
        "weight_map": {name: file for file, names in plan.items() for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [*plan, INDEX]
