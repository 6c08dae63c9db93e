"""mlx-lm on the CPU, whose experts know float32 only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model

PACKAGES = ("mlx-lm",)


class Decoder:
    """`generate_step` for one row, `BatchGenerator` for several."""

    def __init__(self, job: dict[str, Any]) -> None:
        mx.set_default_device(mx.cpu)
        self.model, _ = load_model(Path(job["model"]))
        self.model.set_dtype(mx.float32)
        mx.eval(self.model.parameters())
        self.setting = {"weights": "float32", "device": "cpu"}

    def answer(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """All rows at once."""
        return self._one(prompts[0], new) if len(prompts) == 1 else self._many(prompts, new)

    def _one(self, prompt: list[int], new: int) -> dict[str, Any]:
        start, times, tokens = time.perf_counter(), [], []
        for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=new):
            tokens.append(int(token))
            times.append(time.perf_counter())
        return {"first": times[0] - start, "whole": times[-1] - start, "tokens": [tokens]}

    def _many(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        start, first, early = time.perf_counter(), 0.0, 0
        batch = BatchGenerator(self.model, stop_tokens=[], completion_batch_size=len(prompts))
        told: dict[Any, list[int]] = {uid: [] for uid in batch.insert(prompts, [new] * len(prompts))}
        while said := batch.next_generated():
            for response in said:
                told[response.uid].append(int(response.token))
            if not first and all(told.values()):
                first, early = time.perf_counter() - start, sum(map(len, told.values()))
        return {"first": first, "whole": time.perf_counter() - start, "early": early, "tokens": list(told.values())}
