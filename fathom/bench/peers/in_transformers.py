"""transformers, by its public interface: `from_pretrained`, the model's own loss, `generate`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

PACKAGES = ("transformers",)
ATTENTION = ("eager", "sdpa")
EXPERTS = ("eager", "grouped_mm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def opened(job: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model. Its own chatter is turned off."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    return model.to(job["device"])


class Settings:
    """Attention and experts in each of their ways; the fastest is kept."""

    def __init__(self, model: Any, kept: dict[str, str] | None) -> None:
        self.model, self.kept = model, kept or {}
        if kept:
            self._take(kept["attention"], kept["experts"])

    def choose(self, seconds: Any) -> dict[str, Any]:
        """seconds() -> how long a piece of work took. What was kept, and the seconds of everything tried."""
        tried: dict[str, float] = {}
        for attention, experts in itertools.product(ATTENTION, EXPERTS):
            try:
                self._take(attention, experts)
                seconds()  # warms up
                tried[f"{attention} attention, {experts} experts"] = seconds()
            except (ValueError, RuntimeError, NotImplementedError):
                continue  # a way that this model or version does not have
        best = min(tried, key=lambda way: tried[way])
        attention, experts = best.removesuffix(" experts").split(" attention, ")
        self._take(attention, experts)
        self.kept = {"attention": attention, "experts": experts}
        return {"kept": self.kept, "tried": tried}

    def _take(self, attention: str, experts: str) -> None:
        self.model.set_attn_implementation(attention)
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation(experts)


class Trainer:
    """float32 weights and autocast, fused AdamW over the same two groups as ours, the same clipping."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.model = opened(job, torch.float32).train()
        self.model.config.use_cache = False
        self.device, self.dtype = torch.device(job["device"]), DTYPES[job["precision"]]
        self.tokens = torch.from_numpy(np.load(job["tokens"]).astype(np.int64))
        self.rows, self.micro_batches, self.clip, self.next = job["rows"], job["micro_batches"], job["clip"], 0
        weights = list(self.model.parameters())
        groups = [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": job["weight_decay"]},
            {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
        ]
        betas = tuple(job["betas"])
        self.optimizer = torch.optim.AdamW(groups, lr=job["lr"], betas=betas, eps=job["eps"], fused=True)
        self.settings = Settings(self.model, job.get("kept"))
        self.setting = {
            **self.settings.kept,
            "precision": f"{job['precision']} autocast" if job["precision"] != "float32" else "float32",
        }

    def choose(self) -> dict[str, Any]:
        """Try every way with a forward and a backward pass of one micro-batch; no weight moves."""

        def seconds() -> float:
            start = time.perf_counter()
            self._loss(self.tokens[: self.rows]).backward()
            self._wait()
            self.optimizer.zero_grad(set_to_none=True)
            return time.perf_counter() - start

        chosen = self.settings.choose(seconds)
        self.setting |= chosen["kept"]
        return chosen

    def step(self) -> dict[str, Any]:
        """One optimizer step."""
        start, loss, forward, backward = time.perf_counter(), 0.0, 0.0, 0.0
        for _ in range(self.micro_batches):
            first = self.next * self.rows % len(self.tokens)
            self.next += 1
            begun = time.perf_counter()
            part = self._loss(self.tokens[first : first + self.rows])
            self._wait()
            turned = time.perf_counter()
            (part / self.micro_batches).backward()
            self._wait()
            loss += float(part.detach()) / self.micro_batches
            forward, backward = forward + turned - begun, backward + time.perf_counter() - turned
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        begun = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        now = time.perf_counter()
        update = now - begun
        parts = {"forward": forward, "backward, clip": now - start - forward - update, "update": update}
        return {"seconds": now - start, "loss": loss, "parts": parts}

    def state_bytes(self) -> int:
        """Weights, gradients and moments, float32."""
        return 16 * sum(weight.numel() for weight in self.model.parameters())

    def peak_on_device(self) -> int:
        """Bytes of a GPU's memory at most; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(self.device)
        inputs, targets = rows[:, :-1], rows[:, 1:].contiguous()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.model(input_ids=inputs, labels=targets, shift_labels=targets).loss

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Stamps:
    """A streamer that notes when tokens come; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called with the prompt, then with a token of every row."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """All tokens have come."""


class Decoder:
    """`generate`, greedily, past any end of text."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.model = opened(job, DTYPES[job["weights"]]).eval()
        self.model.generation_config.eos_token_id = None
        self.device = torch.device(job["device"])
        self.settings = Settings(self.model, job.get("kept"))
        self.setting = {"weights": job["weights"], **self.settings.kept}

    def choose(self, prompt: list[int]) -> dict[str, Any]:
        """Try every way with a prompt and some tokens after it."""

        def seconds() -> float:
            return float(self.answer([prompt], 8)["whole"])

        chosen = self.settings.choose(seconds)
        self.setting |= chosen["kept"]
        return chosen

    def answer(self, prompts: Iterable[list[int]], new: int) -> dict[str, Any]:
        """All rows at once; they have one length."""
        rows = torch.tensor(list(prompts), device=self.device)
        stamps = Stamps()
        start = time.perf_counter()
        said = self.model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            streamer=stamps,
        )
        whole = time.perf_counter() - start
        tokens = said[:, rows.shape[1] :].tolist()
        return {"first": stamps.times[1] - start, "whole": whole, "tokens": tokens}
