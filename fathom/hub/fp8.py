"""FP8 weights of released DeepSeek models, dequantised as they are read.                DeepSeek-V3 report 3.3

W[i, j] = Wq[i, j] * scale_inv[i // 128, j // 128]        Wq float8 e4m3, scale_inv float32 beside it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fathom.errors import CheckpointError, ConfigError
from fathom.hub.shards import Shards

SCALE = "_scale_inv"
FP8 = "F8_E4M3"
READABLE = ("F64", "F32", "F16", "BF16", FP8)


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight (n, m) float8, scale (ceil(n / b0), ceil(m / b1)) -> (n, m) float32."""
    rows, columns = weight.shape
    tall = scale.float().repeat_interleave(block[0], 0)[:rows]
    return weight.float() * tall.repeat_interleave(block[1], 1)[:, :columns]


@dataclass(frozen=True)
class Dequantised(Mapping[str, Tensor]):
    """Shards whose FP8 tensors come out as numbers, in the dtype of the embedding; their scales are out of sight."""

    shards: Shards
    block: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, shards: Shards, keys: Mapping[str, Any]) -> Dequantised:
        """ConfigError: another quantisation. CheckpointError: scales that are missing or of a wrong shape."""
        said = keys.get("quantization_config") or {}
        if said and said.get("quant_method") != "fp8":
            raise ConfigError(
                f"the weights are quantised by {said.get('quant_method')}; only fp8 in blocks can be read: "
                "give the weights before they were quantised"
            )
        block = tuple(said.get("weight_block_size") or (128, 128))
        if len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
            raise ConfigError(f"quantization_config.weight_block_size is {block}; two whole numbers are possible")
        for name in shards:
            kind = shards.dtype(name)
            if kind not in READABLE:
                raise CheckpointError(f"{shards.folder}: {name} is {kind}; possible are {', '.join(READABLE)}")
            if kind == FP8:
                _check_scale(shards, name, block)
        embedding = "model.embed_tokens.weight"
        kept = shards[embedding].dtype if embedding in shards else torch.float32
        return cls(shards, block, torch.bfloat16 if kept == torch.float8_e4m3fn else kept)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self.shards.shape(name)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.shards[name]
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        return dequantise(tensor, self.shards[name + SCALE], self.block).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return (n for n in self.shards if not (n.endswith(SCALE) and n.removesuffix(SCALE) in self.shards))

    def __contains__(self, name: object) -> bool:
        return name in self.shards

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _check_scale(shards: Shards, name: str, block: tuple[int, int]) -> None:
    scale, shape = name + SCALE, shards.shape(name)
    if scale not in shards:
        raise CheckpointError(f"{shards.folder}: {name} is FP8 and {scale} is missing; copy the folder again")
    wanted = tuple(-(-size // b) for size, b in zip(shape, block, strict=False))
    if len(shape) != 2 or shards.shape(scale) != wanted:
        raise CheckpointError(
            f"{shards.folder}: {scale} is {list(shards.shape(scale))}; {name} {list(shape)} in blocks of {block[0]} x "
            f"{block[1]} needs {list(wanted)}"
        )
