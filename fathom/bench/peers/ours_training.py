"""Fathom in training: the step that `fathom train` makes, by its own trainer and from its own configuration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fathom.batch import Batch
from fathom.load import load
from fathom.optim.build import build_optimizer
from fathom.optim.schedule import build_schedule
from fathom.pretrain import build_model, build_objective
from fathom.recipe import load_config
from fathom.runtime.device import set_up
from fathom.train.trainer import Trainer as OurTrainer

PACKAGES = ("fathom-lm",)


class Rows:
    """Micro-batches from rows (n, T + 1) of tokens, over and over; what a loader hands to the trainer."""

    def __init__(self, tokens: np.ndarray, rows: int) -> None:
        self.tokens, self.rows, self.next = torch.from_numpy(tokens.astype(np.int64)), rows, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self.next * self.rows % len(self.tokens)
        part = self.tokens[first : first + self.rows]
        self.next += 1
        places = torch.arange(part.shape[1] - 1).expand(len(part), -1)
        return Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), places.contiguous())

    def state_dict(self) -> dict[str, Any]:
        """Nothing is resumed here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is resumed here."""


class Clock:
    """Adds up the seconds of a call that it stands around."""

    def __init__(self, call: Any, device: torch.device) -> None:
        self.call, self.device, self.seconds = call, device, 0.0

    def __call__(self, *given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = self.call(*given, **named)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start
        return found

    def read(self) -> float:
        """The seconds since the last reading."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Trainer:
    """The job's config is a file, whose hardware section has precision, threads and switches; source: a run or None."""

    def __init__(self, job: dict[str, Any]) -> None:
        run = load_config(job["config"])
        device = set_up(run.hardware)
        model = build_model(run, device)
        if (
            job["source"] is not None
        ):  # else the weights are those that the seed gives, here as where they were exported
            model.load_state_dict(load(job["source"]).model.state_dict())
        optimizer = build_optimizer(model, run.optimizer, device.dtype)
        self.forward = Clock(build_objective(run), device.torch_device)
        self.update = Clock(optimizer.step, device.torch_device)
        optimizer.step = self.update  # type: ignore[method-assign]
        rows = Rows(np.load(job["tokens"]), run.training.batch_size)
        self.trainer = OurTrainer(
            run.training,
            model,
            self.forward,
            optimizer,
            build_schedule(run.scheduler, run.training.max_steps, run.optimizer.lr),
            rows,
            device,
            gradient_clip=run.hardware.gradient_clip,
            after_step=[model.balance_step],
            biases=lambda: {n: layer.gate.e_score_correction_bias for n, layer in model.moe_layers().items()},
        )
        arithmetic = str(device.dtype).removeprefix("torch.")
        self.setting = {
            "precision": arithmetic + (", products in float32" if device.emulates else ""),
            "experts": run.model.moe.experts_implementation if run.model.moe else None,
            "compile": run.hardware.compile,
            "recompute": run.hardware.recompute,
            "threads": torch.get_num_threads(),
        }

    def step(self) -> dict[str, Any]:
        """One optimizer step. seconds: of all of it, batches and bookkeeping included."""
        self.forward.read()
        self.update.read()
        start = time.perf_counter()
        report = self.trainer.step()
        seconds = time.perf_counter() - start
        forward, update = self.forward.read(), self.update.read()
        parts = {"forward": forward, "backward, clip": seconds - forward - update, "update": update}
        return {"seconds": seconds, "loss": report.loss, "parts": parts}

    def state_bytes(self) -> int:
        """Weights, gradients and moments, float32: what any contestant must hold."""
        return 16 * sum(weight.numel() for weight in self.trainer.optimizer.weights)

    def peak_on_device(self) -> int:
        """Bytes of a GPU's memory at most; 0 on a CPU."""
        device = self.trainer.device.torch_device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
