"""Recorded passes beside those that are run as they come."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from serving import finish, letters, ready
from tiny_models import ATTENTIONS, MOES

from fathom.generate.generator import Generator
from fathom.generate.request import Request, SamplingParams
from fathom.model.transformer import Trunk
from fathom.serve.engine import Engine, EngineConfig
from fathom.serve.recorded import Play, Recordings


def asked_of(count: int) -> list[Request]:
    chance = random.Random(0)
    prompts = [tuple(chance.randrange(27) for _ in range(chance.randint(1, 13))) for _ in range(count)]
    params = {"ignore_eos": True, "temperature": 0.9}
    return [
        Request(p, SamplingParams.of({**params, "seed": i, "max_tokens": 3 + i}), str(i), routing=True)
        for i, p in enumerate(prompts)
    ]


class Tape:
    """Records as a CUDA graph does: what a pass gives lies in the same memory every time it is played."""

    def __init__(self) -> None:
        self.made = self.played = 0

    def __call__(self, run: Play) -> Play:
        self.made += 1
        kept = run()

        def play() -> Trunk:
            self.played += 1
            fresh = run()
            kept.hidden.copy_(fresh.hidden)
            for old, new in zip(kept.routing, fresh.routing, strict=True):
                for name in ("experts", "weights", "scores"):
                    getattr(old, name).copy_(getattr(new, name))
            return kept

        return play


def recording(engine: Engine, tape: object) -> None:
    runner = engine.runner
    runner.recordings = Recordings(runner.model, runner.pages, runner.layers, tape)  # type: ignore[arg-type]


@pytest.mark.parametrize(("attention", "moe"), [(a, m) for a in ATTENTIONS for m in MOES])
def test_every_model_answers_as_the_reference_loop_does(attention: str, moe: str) -> None:
    model, tokenizer, tape = ready(attention, moe, depths=0), letters(), Tape()
    engine = Engine(model, tokenizer, EngineConfig(block_size=3, max_num_batched_tokens=13))
    recording(engine, tape)
    asked = asked_of(5)
    for request, end in zip(asked, finish(engine, asked), strict=True):
        wanted = Generator(model, tokenizer).complete(request)
        assert end.completion.token_ids == wanted.token_ids
        for a, b in zip(end.completion.tokens, wanted.tokens, strict=True):
            assert [(r.layer, sorted(r.experts)) for r in a.routing] == [
                (r.layer, sorted(r.experts)) for r in b.routing
            ]
    assert (0 < tape.made < tape.played) == (moe != "eager")  # a loop over experts cannot be recorded
    loads, plain = engine.runner.experts, Engine(model, tokenizer, EngineConfig(block_size=3))
    if moe != "dense":  # padding is not counted
        finish(plain, asked)
        assert {layer: load.tolist() for layer, load in loads.items()} == {
            layer: load.tolist() for layer, load in plain.runner.experts.items()
        }


def test_routing_is_told_though_a_later_pass_is_played_in_the_same_memory() -> None:
    model, tokenizer = ready(depths=0), letters()
    engine = Engine(model, tokenizer)
    recording(engine, Tape())
    first, second = (
        Request(prompt, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True), id, routing=True)
        for id, prompt in (("a", (3, 1, 4)), ("b", (7,)))
    )
    found: dict[int, list[object]] = {engine.add(first): []}
    for step in range(9):
        if step == 2:
            found[engine.add(second)] = []  # a prompt of one token is a pass of its own in the same step
        for progress in engine.step():
            found[progress.ticket] += [output.routing for output in progress.outputs]
    for request, told in zip((first, second), found.values(), strict=True):
        wanted = [output.routing for output in Generator(model, tokenizer).complete(request).tokens]
        assert [[(r.layer, r.experts) for r in each] for each in told] == [  # type: ignore[attr-defined]
            [(r.layer, r.experts) for r in each] for each in wanted
        ]


def test_padding_writes_to_the_spare_block_alone() -> None:
    model = ready(depths=0)
    engine = Engine(model, letters(), EngineConfig(block_size=3))
    recording(engine, Tape())
    finish(engine, asked_of(3))  # of four rows one is padding
    untouched = [b for b in range(engine.blocks.count) if not engine.pages.layers[0][b].any()]
    assert len(untouched) > 20
    assert engine.pages.layers[0][-1, 0].any()
    assert not engine.pages.layers[0][-1, 1:].any()


def test_what_cannot_be_recorded_is_run_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def broken(run: Play) -> Play:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, tokenizer = ready(depths=0), letters()
    engine = Engine(model, tokenizer)
    recording(engine, broken)
    asked = asked_of(3)
    with caplog.at_level(logging.WARNING, "fathom"):
        ends = finish(engine, asked)
    assert caplog.messages == [
        "decoding goes without CUDA graphs, recording failed: operation not permitted when stream is capturing"
    ]
    for request, end in zip(asked, ends, strict=True):
        assert end.completion.token_ids == Generator(model, tokenizer).complete(request).token_ids


def test_on_a_cpu_nothing_is_recorded() -> None:
    assert Engine(ready(depths=0), letters()).runner.recordings is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_play_the_same(dtype: torch.dtype) -> None:
    model, tokenizer, asked = ready(depths=0).to(dtype).cuda(), letters(), asked_of(5)
    plain = Engine(model, tokenizer, EngineConfig(enforce_eager=True))
    graphs = Engine(model, tokenizer)
    assert graphs.runner.recordings is not None
    wanted = [end.completion.token_ids for end in finish(plain, asked)]
    assert [end.completion.token_ids for end in finish(graphs, asked)] == wanted
    assert graphs.runner.recordings._works == bool(graphs.runner.recordings._made)
    assert graphs.runner.recordings._works or dtype == torch.float32  # grouped products are for bfloat16
