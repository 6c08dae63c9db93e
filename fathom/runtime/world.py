"""The world: which of how many processes this one is, and the few words that they exchange.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them the world is one process and every exchange is free.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 << 20  # gradients travel in buckets of about this size


@dataclass(frozen=True)
class World:
    """rank of size processes; local_rank: its number on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def from_environment() -> World:
        """What torchrun said, or a world of one."""
        rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        return World(rank, size, local)

    def join(self, device: torch.device, timeout_seconds: float = 1800) -> World:
        """Meet the others (gloo on CPU, NCCL on CUDA); returns itself. Does nothing alone or when already joined."""
        if self.size > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, rank=self.rank, world_size=self.size, timeout=timedelta(seconds=timeout_seconds)
            )
        return self

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Rank 0 writes files and speaks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The sum of each number over all ranks (float64: counts are exact)."""
        if self.size == 1:
            return [float(v) for v in values]
        return self.sum_(torch.tensor(values, dtype=torch.float64, device=device)).tolist()

    def sum_in_buckets_(self, tensors: Iterable[Tensor]) -> None:
        """The sum of each tensor over all ranks, in place, several tensors a message; same order on every rank."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and (tensor.dtype != bucket[0].dtype or _bytes(bucket) + _bytes([tensor]) > BUCKET_BYTES):
                _sum_bucket(bucket)
                bucket = []
            bucket.append(tensor)
        if bucket:
            _sum_bucket(bucket)

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Everyone gets the tensor of rank `source`, in place."""
        if self.size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The picklable value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        """Wait for everyone."""
        if self.size > 1:
            dist.barrier()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _sum_bucket(bucket: Sequence[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in bucket])
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))
