"""Two processes over gloo train as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TRAIN = Path(__file__).parents[1] / "train"
RANK = f"""
import json, os, sys
sys.path.insert(0, {str(TRAIN)!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from toy_training import Toy, ToyLoader, toy_trainer
from fathom.distributed.data_parallel import DataParallel
from fathom.runtime.world import World
from fathom.train.callbacks import Callback

class Keep(Callback):
    def __init__(self): self.seen = []
    def on_step(self, r):
        counts = list(r.routing[1].counts), r.routing[1].entropy
        self.seen.append([r.loss, r.grad_norm, r.balance_loss, r.tokens, counts, r.mtp_loss])

mode, folder = sys.argv[1], Path(sys.argv[2])
world = World.from_environment().join(torch.device("cpu"))
toy = Toy(seed=world.rank if world.size > 1 else 0, dropout=0.0)   # ranks begin apart: rank 0's weights count
ranks = DataParallel(toy, world)
keep = Keep()
trainer = toy_trainer(
    folder / "run" if mode == "run" else None, world=world, model=toy, callbacks=[keep], max_steps=6,
    loader=ToyLoader(rank=world.rank, size=world.size, ragged=True),
)
trainer.sum_gradients = ranks.sum_gradients
if mode == "signal" and world.rank == 1:
    trainer._signal = 15
if mode == "full":
    from fathom.errors import CheckpointError
    from fathom.train.checkpoint import RunFolder
    class Full(RunFolder):
        def save(self, *a, **k): raise CheckpointError("full")
    trainer.folder = Full(folder) if world.rank == 0 else RunFolder(folder)
    try:
        trainer.run()
    except CheckpointError as error:
        (folder / f"error{{world.rank}}").write_text(str(error))
    world.leave(); sys.exit(0)
finish = trainer.run()
weights = [p.detach().flatten().tolist() for p in toy.state_dict().values()]
(folder / f"{{mode}}{{world.size}}.{{world.rank}}.json").write_text(
    json.dumps([keep.seen, weights, finish.step, finish.exit_code]))
world.leave()
"""


def launch(folder: Path, size: int, mode: str) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, mode, str(folder)],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    files = [folder / f"{mode}{size}.{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    (one,) = launch(tmp_path, 1, "plain")
    first, second = launch(tmp_path, 2, "run")
    assert first[1] == second[1]  # to the byte
    assert second[0] == []  # only rank 0 listens
    assert len(first[0]) == 6
    for alone, both in zip(one[0], first[0], strict=True):
        assert alone[3:4] == both[3:4]
        assert alone[4][0] == both[4][0]
        assert [alone[i] for i in (0, 1, 2, 5)] == pytest.approx([both[i] for i in (0, 1, 2, 5)], rel=1e-4)
    for a, b in zip(one[1], first[1], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-3, atol=1e-4)
    saved = tmp_path / "run" / "checkpoints" / "step-6"
    from safetensors.torch import load_file

    assert {k.split(".")[0] for k in load_file(saved / "rng.safetensors")} == {"rank0", "rank1"}


def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    ends = launch(tmp_path, 2, "signal")
    assert [(step, code) for _, _, step, code in ends] == [(1, 143), (1, 143)]


def test_a_full_disk_on_rank_0_is_told_to_all(tmp_path: Path) -> None:
    launch(tmp_path, 2, "full")
    assert [(tmp_path / f"error{rank}").read_text() for rank in (0, 1)] == ["full", "full"]
