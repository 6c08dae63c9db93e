"""The engine: many requests at once, each with the tokens that the reference loop would give it.

    add -> wait -> [ schedule -> run -> commit ]*  -> end          one step is what stands in brackets

Continuous batching with prompts in chunks, a paged cache of latents with reuse of known beginnings, preemption when
blocks run out, and drafts by MTP as long as they pay. One thread steps; `worker.py` gives it one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import psutil
import torch
from pydantic import Field

from fathom.errors import RequestError
from fathom.generate.answer import Answer
from fathom.generate.passage import routing_at
from fathom.generate.request import Completion, Request, TokenOutput
from fathom.knobs import Knobs
from fathom.model.cost import Cost
from fathom.model.precision import compute_dtype
from fathom.model.transformer import Transformer
from fathom.serve.blocks import Blocks
from fathom.serve.drafting import Drafter, Drafts
from fathom.serve.pace import Pace
from fathom.serve.paged_cache import Pages
from fathom.serve.recorded import cuda_graph
from fathom.serve.runner import Runner, Step
from fathom.serve.scheduler import Scheduler, Sequence, Share
from fathom.tokenizer.tokenizer import Tokenizer

Why = Literal["stop", "length", "cancelled", "deadline", "failed"]
MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.85}  # of what is free, for the cache at most


class EngineConfig(Knobs):
    """How much is done at once. Names are vLLM's where it has one."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Requests under way at once; others wait."""
    max_num_batched_tokens: int = Field(default=512, ge=1)
    """Tokens that a step reads at most: longer prompts are read in chunks, between the tokens of others."""
    block_size: int = Field(default=16, ge=1)
    """Tokens in a block of the cache."""
    cache_tokens: int | None = Field(default=None, ge=1)
    """Tokens that the cache holds; null: max_num_seqs windows, or what a quarter of the free memory (of a GPU's: 85 %)
    holds."""
    enable_prefix_caching: bool = True
    """Do not read again what was read before."""
    speculative: Literal["auto", "on", "off"] = "auto"
    """Let MTP depths draft: auto while it is faster, as measured."""
    enforce_eager: bool = False
    """On CUDA, do not record passes of one token a row as CUDA graphs."""
    max_num_queued: int = Field(default=256, ge=0)
    """Requests that may wait; more are turned away."""


@dataclass(frozen=True)
class Timing:
    """Seconds: waiting, until the first token was there, from the first to the last, in all. first_token counts from
    the arrival; None: there was none."""

    queued: float
    prefill: float
    decode: float
    total: float
    first_token: float | None


@dataclass(frozen=True)
class End:
    """How a request ended. cached_tokens: of the prompt, found in the prefix cache; error: in words, of `failed`."""

    why: Why
    completion: Completion
    cached_tokens: int
    timing: Timing
    error: str | None = None


@dataclass(frozen=True)
class Progress:
    """What a step did for a request; `end` in the last one."""

    ticket: int
    outputs: tuple[TokenOutput, ...] = ()
    end: End | None = None


@dataclass(frozen=True)
class Stats:
    """Now: running, waiting, blocks. Since the start: everything else. expert_tokens: by layer, by expert."""

    running: int
    waiting: int
    cache_blocks: int
    cache_blocks_used: int
    block_size: int
    cache_bytes: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    step_tokens: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_per_position: tuple[int, ...]
    speculating: bool
    expert_tokens: Mapping[int, tuple[int, ...]]


@dataclass
class _Totals:
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted: list[int] = field(default_factory=list)


class Engine:
    """Serves one model, which is in eval mode. ValueError: it is in training mode. RequestError: speculation is `on`
    and the model has no MTP depths."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: EngineConfig | None = None) -> None:
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before serving it")
        self.model, self.tokenizer, self.config = model, tokenizer, config or EngineConfig()
        self.window = model.config.max_position_embeddings
        depths = 0 if self.config.speculative == "off" else len(model.mtp)
        if self.config.speculative == "on" and not depths:
            raise RequestError(
                "Speculation was asked for, and model.mtp.num_nextn_predict_layers of this model is 0; use "
                "speculative: auto or off."
            )
        size = self.config.block_size
        self.blocks = Blocks(max(1, self._cache_tokens() // size), size, self.config.enable_prefix_caching)
        weight, layers = model.embed_tokens.weight, len(model.layers) + depths
        self.pages = Pages(
            model.config.cache_widths, layers, self.blocks.count, size, compute_dtype(weight), weight.device
        )
        drafter = Drafter(model, self.pages) if depths else None
        self.depths, self.pace = depths, Pace(self.config.speculative if depths else "off")
        record = cuda_graph() if weight.is_cuda and not self.config.enforce_eager else None
        self.runner = Runner(model, self.pages, drafter, record)
        self.scheduler = Scheduler(
            self.blocks, self.config.max_num_seqs, self.config.max_num_batched_tokens, self._drafts_of
        )
        self._sequences: dict[int, Sequence] = {}
        self._tickets = count(1)
        self._totals = _Totals(accepted=[0] * depths)
        self._ended: list[Progress] = []
        self._drafting = False  # this step

    def _cache_tokens(self) -> int:
        """Tokens that the cache holds, a whole window at least."""
        if self.config.cache_tokens is not None:
            return self.config.cache_tokens
        weight = self.model.embed_tokens.weight
        each = Cost(self.model.config).cache_bytes_per_token(compute_dtype(weight).itemsize)
        free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else psutil.virtual_memory().available
        affordable = int(MEMORY_SHARE[weight.device.type] * free) // max(1, each)
        return max(self.window + 1, min(self.config.max_num_seqs * self.window, affordable))

    # --- requests

    def check(self, request: Request) -> None:
        """RequestError: the model, or this cache, can never honour it. May be called from any thread."""
        request.check(self.model.embed_tokens.num_embeddings, self.window)
        holds = self.blocks.count * self.blocks.size
        wanted = request.params.max_tokens
        room = self.window - len(request.prompt_ids)
        total = len(request.prompt_ids) + (room if wanted is None else min(wanted, room))
        if total > holds:
            raise RequestError(
                f"The prompt has {len(request.prompt_ids)} tokens and the answer may have "
                f"{total - len(request.prompt_ids)}; the cache of this server holds {holds} together. Ask for fewer "
                "(max_tokens), or start the server with more cache_tokens."
            )

    def add(self, request: Request, *, deadline: float | None = None, ticket: int | None = None) -> int:
        """Queue a request; its ticket. deadline: time.monotonic() at which it is ended as it stands. RequestError: see
        `check`."""
        self.check(request)
        ticket = next(self._tickets) if ticket is None else ticket
        answer = Answer(request, self.tokenizer, self.window)
        drafts = Drafts(self.depths) if self.depths and self.pace.admits() else None
        sequence = Sequence(ticket, answer, time.monotonic(), deadline, drafts=drafts)
        self._sequences[ticket] = sequence
        self.scheduler.add(sequence)
        return ticket

    def cancel(self, ticket: int, why: Why = "cancelled", error: str | None = None) -> None:
        """End a request as it stands; its last `Progress` comes with the next step. Unknown tickets are ignored."""
        sequence = self._sequences.get(ticket)
        if sequence is not None:
            self._ended.append(Progress(ticket, (), self._end(sequence, why, error)))

    def take_ended(self) -> list[Progress]:
        """The last words of requests that were cancelled since the last step."""
        done, self._ended = self._ended, []
        return done

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences or self._ended)

    # --- a step

    def step(self) -> list[Progress]:
        """Schedule, run, commit: everything that became known."""
        now = time.monotonic()
        for sequence in [s for s in self._sequences.values() if s.deadline is not None and s.deadline <= now]:
            self.cancel(sequence.ticket, "deadline")
        done = self.take_ended()
        speaking = sum(s.decoding for s in self.scheduler.running)
        self._drafting = bool(self.depths and speaking) and self.pace.drafts(speaking)
        shares = self.scheduler.schedule()
        if not shares:
            return done
        for share in shares:
            if share.sequence.started is None:
                share.sequence.started = now
        steps = self.runner.run(shares)
        self._commit_prompts(shares)
        progress = [self._commit(step) for step in steps]
        seconds = time.monotonic() - now
        self._count(shares, progress)
        if self.depths and speaking and all(len(share.sequence.answer.outputs) > 1 for share in shares):
            drafted = any(share.drafts for share in shares)
            self.pace.observe(speaking, drafted, sum(len(p.outputs) for p in progress), seconds)
        return done + progress

    def _drafts_of(self, sequence: Sequence) -> int:
        """How many drafts a sequence may have now."""
        drafts: Drafts | None = sequence.drafts
        if drafts is not None and drafts.lost:
            sequence.drafts = drafts = None
        if drafts is None or not self._drafting or not drafts.held[0]:
            return 0
        return max(0, min(self.depths, sequence.answer.left - 1))

    def _commit_prompts(self, shares: list[Share]) -> None:
        for share in shares:
            if not share.reaches_end:
                self.scheduler.commit(share.sequence, share.start + share.count)
            if not share.sequence.answer.turn.output:
                self._totals.prompt_tokens += share.count

    def _commit(self, step: Step) -> Progress:
        """Take the tokens that hold: the chosen one, and those after drafts that were right."""
        sequence, answer = step.share.sequence, step.share.sequence.answer
        outputs: list[TokenOutput] = []
        for n, choice in enumerate(step.choices):
            right = n < len(step.drafts) and choice.token == step.drafts[n]
            asked = answer.request.routing
            routing = routing_at(step.passage, step.row, step.place + n) if asked else ()
            outputs.append(answer.take(choice, routing, right))
            if not right or answer.finished:
                break
        right_ones = sum(output.draft for output in outputs)
        answer.drafted += len(step.drafts)
        answer.accepted += right_ones
        if step.drafts:
            self._totals.drafts += 1
            self._totals.draft_tokens += len(step.drafts)
            self._totals.accepted_tokens += right_ones
            for n in range(right_ones):
                self._totals.accepted[n] += 1
        kept = len(outputs)
        if sequence.spoke is None:
            sequence.spoke = time.monotonic()
        if step.share.decoding and sequence.drafts is not None:
            sequence.drafts.see(step.passage.hidden[step.row, step.place : step.place + kept])
        self.scheduler.commit(sequence, step.share.start + step.share.count - 1 + kept)
        end = None
        if answer.finished:
            why = answer.outputs[-1].finish_reason
            assert why is not None
            end = self._end(sequence, why)
        return Progress(sequence.ticket, tuple(outputs), end)

    def _end(self, sequence: Sequence, why: Why, error: str | None = None) -> End:
        """Let go of a sequence."""
        self.scheduler.remove(sequence)
        del self._sequences[sequence.ticket]
        now, arrived = time.monotonic(), sequence.arrived
        started, spoke = sequence.started or now, sequence.spoke
        timing = Timing(
            queued=started - arrived,
            prefill=(spoke or now) - started,
            decode=0.0 if spoke is None else now - spoke,
            total=now - arrived,
            first_token=None if spoke is None else spoke - arrived,
        )
        return End(why, sequence.answer.completion(), sequence.cached or 0, timing, error)

    # --- numbers

    def _count(self, shares: list[Share], progress: list[Progress]) -> None:
        self._totals.steps += 1
        self._totals.step_tokens += sum(share.count + share.drafts for share in shares)
        self._totals.generation_tokens += sum(len(p.outputs) for p in progress)

    def stats(self) -> Stats:
        """Numbers of now and since the start. May be called from any thread."""
        totals, blocks = self._totals, self.blocks
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            cache_blocks=blocks.count,
            cache_blocks_used=blocks.used,
            block_size=blocks.size,
            cache_bytes=self.pages.bytes,
            preemptions=self.scheduler.preemptions,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
            prompt_tokens=totals.prompt_tokens,
            generation_tokens=totals.generation_tokens,
            steps=totals.steps,
            step_tokens=totals.step_tokens,
            drafts=totals.drafts,
            draft_tokens=totals.draft_tokens,
            accepted_tokens=totals.accepted_tokens,
            accepted_per_position=tuple(totals.accepted),
            speculating=bool(self.depths) and self.pace.winning,
            expert_tokens={layer: tuple(n.tolist()) for layer, n in sorted(self.runner.experts.items())},
        )
