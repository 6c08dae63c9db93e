from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
from serving import eager_to_please, finish, letters, ready
from tiny_models import ATTENTIONS, MOES

from fathom.errors import RequestError
from fathom.generate.generator import Generator
from fathom.generate.request import Completion, Request, SamplingParams
from fathom.model.cost import Cost
from fathom.model.transformer import Transformer
from fathom.serve.engine import End, Engine, EngineConfig

OPTIONS: list[dict[str, object]] = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7, "logprobs": 2},
    {"temperature": 0.9, "min_p": 0.2, "repetition_penalty": 1.3},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.3},
    {"temperature": 0, "logit_bias": {3: 4.0}, "stop": ["dd", "q "]},
    {"temperature": 1.0, "ignore_eos": False, "min_tokens": 3, "logit_bias": {28: 3.0}},
    {"temperature": 1.0, "stop_token_ids": [4, 7]},
]


def requests(count: int, seed: int = 0, longest: int = 14) -> list[Request]:
    """Prompts of all lengths, half of which begin alike, with all options in turn."""
    chance = random.Random(seed)
    shared = [chance.randrange(27) for _ in range(9)]
    found = []
    for i in range(count):
        own = [chance.randrange(27) for _ in range(chance.randint(1, longest - 9 if i % 2 else longest))]
        prompt = tuple(shared + own if i % 2 else own)
        options = {"ignore_eos": True, "max_tokens": chance.randint(1, 11), "seed": i, **OPTIONS[i % len(OPTIONS)]}
        found.append(Request(prompt, SamplingParams.of(options), str(i), routing=i % 3 == 0))
    return found


def assert_same(got: Completion, wanted: Completion) -> None:
    assert got.token_ids == wanted.token_ids, got.id
    assert (got.text, got.finish_reason, got.stop_reason) == (wanted.text, wanted.finish_reason, wanted.stop_reason)
    for a, b in zip(got.tokens, wanted.tokens, strict=True):
        assert a.text == b.text
        assert a.logprob == (None if b.logprob is None else pytest.approx(b.logprob, abs=1e-4))
        assert [(r.layer, sorted(r.experts)) for r in a.routing] == [(r.layer, sorted(r.experts)) for r in b.routing]


@pytest.mark.parametrize(("attention", "moe"), [(a, m) for a in ATTENTIONS for m in MOES])
def test_every_model_answers_as_the_reference_loop_does(attention: str, moe: str) -> None:
    model, tokenizer = ready(attention, moe, depths=1), letters()
    engine = Engine(model, tokenizer, EngineConfig(block_size=3, max_num_batched_tokens=13, speculative="on"))
    asked = requests(6)
    ends = finish(engine, asked)
    for request, end in zip(asked, ends, strict=True):
        assert_same(end.completion, Generator(model, tokenizer).complete(request))


@pytest.mark.parametrize("order", [2, 5])
def test_a_model_with_an_n_gram_memory_does_too(order: int) -> None:
    model, tokenizer = ready("mla", "v3", depths=0, ngram={"order": order}), letters()
    assert model.memory is not None
    chance = random.Random(order)
    model.memory.count(torch.tensor([chance.randrange(27) for _ in range(400)]))
    engine = Engine(model, tokenizer, EngineConfig(block_size=3, max_num_batched_tokens=13))
    asked = requests(9)
    ends = finish(engine, asked)
    for request, end in zip(asked, ends, strict=True):
        assert_same(end.completion, Generator(model, tokenizer).complete(request))
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("speculative", ["off", "on", "auto"])
@pytest.mark.parametrize("depths", [1, 3])
def test_interleaved_at_random_with_few_blocks(speculative: str, depths: int) -> None:
    """Arrivals and cancellations at any time, prompts in chunks, preemption, prefixes shared: the same tokens."""
    model, tokenizer = eager_to_please(depths), letters()
    preempted = hits = accepted = 0
    for trial in range(6):
        chance = random.Random(trial)
        config = EngineConfig(
            block_size=chance.choice([1, 2, 5]), max_num_batched_tokens=chance.choice([3, 7, 40]),
            max_num_seqs=chance.choice([2, 5, 9]), cache_tokens=30, speculative=speculative,
        )  # fmt: skip
        engine = Engine(model, tokenizer, config)
        waiting, tickets, ends = requests(14, trial), dict[int, Request](), dict[int, End]()
        while waiting or engine.has_work:
            if waiting and chance.random() < 0.5:
                request = waiting.pop()
                tickets[engine.add(request)] = request
            if tickets and chance.random() < 0.05:
                engine.cancel(chance.choice(list(tickets)))
            for progress in engine.step():
                if progress.end is not None:
                    ends[progress.ticket] = progress.end
        assert engine.stats().cache_blocks_used == 0
        assert set(ends) == set(tickets)
        for ticket, end in ends.items():
            wanted = Generator(model, tokenizer).complete(tickets[ticket])
            if end.why == "cancelled":
                count = len(end.completion.tokens)
                assert end.completion.token_ids == wanted.token_ids[:count]
            else:
                assert_same(end.completion, wanted)
        stats = engine.stats()
        preempted += stats.preemptions
        hits += stats.prefix_hits
        accepted += stats.accepted_tokens
    assert preempted > 0
    assert hits > 0
    assert (accepted > 0) == (speculative != "off")


def test_prompts_are_scored_in_chunks_and_despite_the_prefix_cache() -> None:
    model, tokenizer = ready(), letters()
    engine = Engine(model, tokenizer, EngineConfig(block_size=2, max_num_batched_tokens=3))
    params = SamplingParams(max_tokens=2, prompt_logprobs=2, temperature=0)
    request = Request((3, 1, 4, 1, 5, 9, 2, 6), params)
    wanted = Generator(model, tokenizer).complete(request).prompt_scores
    for end in finish(engine, [request, replace(request, prompt_ids=(7,)), request]):
        scores = end.completion.prompt_scores
        assert scores is not None
        assert scores[0] is None
        if len(scores) > 1:
            assert wanted is not None
            assert len(scores) == len(wanted)
            for a, b in zip(scores[1:], wanted[1:], strict=True):
                assert a is not None
                assert b is not None
                assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
                assert [i for i, _ in a.top_logprobs] == [i for i, _ in b.top_logprobs]


def test_a_known_beginning_is_not_read_again() -> None:
    model, tokenizer = ready(), letters()
    engine = Engine(model, tokenizer, EngineConfig(block_size=4))
    request = Request(tuple(range(11)), SamplingParams(max_tokens=2, temperature=0))
    first, second = finish(engine, [request]) + finish(engine, [request])
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert first.completion.token_ids == second.completion.token_ids
    stats = engine.stats()
    assert stats.prompt_tokens == 11 + 3
    off = Engine(model, tokenizer, EngineConfig(block_size=4, enable_prefix_caching=False))
    assert [end.cached_tokens for end in finish(off, [request]) + finish(off, [request])] == [0, 0]


def test_the_cache_is_as_large_as_the_formula_says() -> None:
    for attention in ("mla_low_rank", "gqa"):
        model = ready(attention, depths=0)
        engine = Engine(model, letters(), EngineConfig(block_size=4, cache_tokens=40))
        assert engine.stats().cache_bytes == 40 * Cost(model.config).cache_bytes_per_token(4)


def test_every_expert_that_was_used_is_counted_once_a_token() -> None:
    model, tokenizer = ready(), letters()
    engine = Engine(model, tokenizer, EngineConfig(speculative="off"))
    finish(engine, requests(5))
    stats = engine.stats()
    read = stats.prompt_tokens + stats.generation_tokens - 5  # the last token of an answer is never read
    assert {layer: sum(counts) for layer, counts in stats.expert_tokens.items()} == {1: 2 * read}


def test_a_request_past_its_deadline_ends_as_it_stands() -> None:
    engine = Engine(ready(), letters())
    late = engine.add(Request((1, 2), SamplingParams(max_tokens=3)), deadline=time.monotonic() - 1)
    (progress,) = engine.step()
    assert progress.ticket == late
    assert progress.end is not None
    assert progress.end.why == "deadline"
    assert not engine.has_work


def test_what_can_never_be_honoured_is_refused_at_once() -> None:
    engine = Engine(ready(), letters(), EngineConfig(cache_tokens=20))
    with pytest.raises(RequestError, match="holds 16 together"):  # whole blocks of 16
        engine.add(Request((1, 2), SamplingParams(max_tokens=30)))
    with pytest.raises(RequestError, match="window holds 32"):
        engine.add(Request((1,) * 32))
    with pytest.raises(RequestError, match="num_nextn_predict_layers"):
        Engine(ready(depths=0), letters(), EngineConfig(speculative="on"))
    with pytest.raises(ValueError, match="training mode"):
        Engine(ready().train(), letters())


def test_many_rows_take_one_pass() -> None:
    """Continuous batching: as many steps as the longest answer has tokens, whoever else is there."""
    engine = Engine(ready(), letters(), EngineConfig(speculative="off"))
    finish(engine, [Request((i,), SamplingParams(max_tokens=9, ignore_eos=True)) for i in range(12)])
    assert engine.stats().steps == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_run(dtype: torch.dtype) -> None:
    model: Transformer = ready().to(dtype)
    engine = Engine(model, letters())
    ends = finish(engine, requests(4))
    assert all(end.why in ("length", "stop") for end in ends)
    assert engine.pages.layers[0].dtype == dtype


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model, tokenizer = ready(), letters()
    asked = requests(9)
    wanted = [Generator(model, tokenizer).complete(request) for request in asked]
    ends = finish(Engine(model.cuda(), tokenizer, EngineConfig(speculative="on")), asked)
    assert [end.completion.token_ids for end in ends] == [done.token_ids for done in wanted]
