"""Fathom in decoding: the loop of `fathom generate` for one row, the engine of `fathom serve` for any number."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from fathom.generate.generator import Generator
from fathom.generate.request import Request, SamplingParams
from fathom.load import Run, load
from fathom.serve.engine import Engine, EngineConfig, Progress

PACKAGES = ("fathom-lm",)


def opened(job: dict[str, Any]) -> Run:
    """The run, its weights in the job's dtype, or of a byte each."""
    torch.set_num_threads(job["threads"])
    if job["weights"] != "int8":
        return load(job["model"], job["device"], job["weights"])
    from fathom.model.quantize import quantize_int8

    run = load(job["model"], job["device"])
    quantize_int8(run.model)
    return run


def wanted(prompt: Sequence[int], new: int, temperature: float = 0.0) -> Request:
    """So many tokens, past any end of text: the likeliest, or drawn with the same chance each time."""
    return Request(tuple(prompt), SamplingParams(max_tokens=new, temperature=temperature, ignore_eos=True, seed=0))


class Decoder:
    """One row goes the faster of two ways, several go through the engine."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.run = opened(job)
        self.loop = Generator(self.run.model, self.run.tokenizer)
        config = EngineConfig(
            max_num_seqs=job["rows"],
            cache_tokens=job["rows"] * (job["window"] + EngineConfig().block_size),
            speculative="off",
        )
        self.engine = Engine(self.run.model, self.run.tokenizer, config)
        self.way = job.get("kept", {}).get("one row by", "engine")
        self.setting = {
            "weights": job["weights"],
            "chunk": config.max_num_batched_tokens,
            "one row by": self.way,
        }

    def choose(self, prompt: list[int]) -> dict[str, Any]:
        """Try both ways with a prompt and some tokens after it."""
        tried: dict[str, float] = {}
        for way in ("loop", "engine"):
            self.way = way
            self.answer([prompt], 8)
            tried[way] = self.answer([prompt[1:]], 8)["whole"]
        self.way = min(tried, key=lambda way: tried[way])
        return {"kept": {"one row by": self.way}, "tried": tried}

    def answer(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """All rows at once."""
        if len(prompts) == 1 and self.way == "loop":
            return self._by_loop(prompts[0], new)
        return self._by_engine(prompts, new)

    def _by_loop(self, prompt: list[int], new: int) -> dict[str, Any]:
        start = time.perf_counter()
        times, tokens = [], []
        for output in self.loop.stream(wanted(prompt, new)):
            times.append(time.perf_counter())
            tokens.append(output.token)
        return {"first": times[0] - start, "whole": times[-1] - start, "tokens": [tokens]}

    def _by_engine(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        start = time.perf_counter()
        told: dict[int, list[int]] = {self.engine.add(wanted(prompt, new)): [] for prompt in prompts}
        first, early = 0.0, 0
        while self.engine.has_work:
            for progress in self.engine.step():
                told[progress.ticket] += [output.token for output in progress.outputs]
            if not first and all(told.values()):
                first, early = time.perf_counter() - start, sum(map(len, told.values()))
        whole = time.perf_counter() - start
        return {"first": first, "whole": whole, "early": early, "tokens": list(told.values())}

    @torch.inference_mode()
    def gap(self, prompt: list[int], ours: int, theirs: int) -> float:
        """By how many nats our token is likelier than another after a prompt."""
        row = self.run.model(torch.tensor([prompt], device=self.run.device))[0, -1].float().log_softmax(-1)
        return float(row[ours] - row[theirs])


class Server:
    """An engine under load. job: {model, weights, threads, device, rows, tokens (of the cache), speculative}."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.run = opened(job)
        self.job = job
        self.setting = {"weights": job["weights"], "block_size": EngineConfig().block_size}
        self.engines = {mode: self._engine(mode) for mode in job["speculative"]}

    def _engine(self, mode: str) -> Engine:
        tokens = self.job["tokens"]
        config = EngineConfig(max_num_seqs=self.job["rows"], cache_tokens=tokens, speculative=mode)  # type: ignore[arg-type]
        return Engine(self.run.model, self.run.tokenizer, config)

    def cache(self) -> dict[str, int]:
        """Bytes of the cache as it is set aside, and the tokens that it holds."""
        mode, engine = next(iter(self.engines.items()))
        stats = engine.stats()
        layers = len(self.run.model.layers) + (0 if mode == "off" else len(self.run.model.mtp))
        held = stats.cache_blocks * stats.block_size
        return {"bytes": stats.cache_bytes, "tokens": held, "layers": layers}

    def load(
        self, mode: str, prompts: list[list[int]], at_once: int, new: int, temperature: float = 0.0
    ) -> dict[str, Any]:
        """Answer all prompts, so many at once, the next as soon as one is done. seconds: of everything; first: of each
        request, from its arrival; gaps: between the arrivals of tokens; steps: [seconds, tokens] of every step in which
        nobody read a prompt."""
        engine, waiting = self.engines[mode], [wanted(prompt, new, temperature) for prompt in prompts]
        seen = _Seen()
        before, start = engine.stats(), time.perf_counter()
        while waiting or seen.under_way:
            while waiting and seen.under_way < at_once:
                seen.begin(engine.add(waiting.pop(0)))
            speaking, begun = seen.all_speak, time.perf_counter()
            seen.step(engine.step(), begun, speaking)
        seconds, after = time.perf_counter() - start, engine.stats()
        return {
            "seconds": seconds,
            "tokens": seen.tokens,
            "first": seen.first,
            "gaps": seen.gaps,
            "steps": seen.steps,
            "drafted": after.draft_tokens - before.draft_tokens,
            "accepted": after.accepted_tokens - before.accepted_tokens,
            "speculating": after.speculating,
        }


class _Seen:
    """What an engine's progress tells, with times."""

    def __init__(self) -> None:
        self.last: dict[int, float] = {}  # of requests under way: when they began, or last said something
        self.silent: set[int] = set()
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.steps: list[tuple[float, int]] = []
        self.tokens = 0

    @property
    def under_way(self) -> int:
        """Requests."""
        return len(self.last)

    @property
    def all_speak(self) -> bool:
        """Whether nobody's prompt is being read."""
        return not self.silent

    def begin(self, ticket: int) -> None:
        """A request was added."""
        self.last[ticket] = time.perf_counter()
        self.silent.add(ticket)

    def step(self, done: list[Progress], begun: float, speaking: bool) -> None:
        """A step is over."""
        now, made = time.perf_counter(), sum(len(progress.outputs) for progress in done)
        self.tokens += made
        if speaking:
            self.steps.append((now - begun, made))
        for progress in done:
            if progress.outputs:
                (self.first if progress.ticket in self.silent else self.gaps).append(now - self.last[progress.ticket])
                self.silent.discard(progress.ticket)
                self.last[progress.ticket] = now
            if progress.end is not None:
                del self.last[progress.ticket]
