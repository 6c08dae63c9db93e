"""A world of one says everything to itself."""

from __future__ import annotations

import pytest
import torch

from fathom.runtime.world import World


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = World.from_environment().join(torch.device("cpu"))
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert world.sums([1, 2.5], torch.device("cpu")) == [1.0, 2.5]
    assert world.gather({"a": 1}) == [{"a": 1}]
    tensor = torch.ones(3)
    world.sum_in_buckets_([tensor])
    assert torch.equal(world.broadcast_(world.sum_(tensor)), torch.ones(3))
    world.barrier()
    world.leave()


def test_torchrun_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(3, 8, 1)
    assert not World.from_environment().is_first
