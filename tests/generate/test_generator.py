from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import ATTENTIONS, MOES
from tiny_text import PROMPT, ask, letters, ready, without_cache

from fathom.errors import RequestError
from fathom.generate.generator import Generator
from fathom.generate.request import SamplingParams

EVERY = [(a, m) for a in ATTENTIONS for m in MOES]


@pytest.mark.parametrize(("attention", "moe"), EVERY)
def test_the_loop_is_its_twin_without_a_cache(attention: str, moe: str) -> None:
    model, tokenizer = ready(attention, moe), letters()
    for options in ({"temperature": 0}, {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.2}):
        request = ask(**options)
        got = Generator(model, tokenizer).complete(request)
        assert got.token_ids == without_cache(model, tokenizer, request).token_ids
        assert len(got.tokens) == 13


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("attention", ["gqa", "mla_yarn"])
def test_chunks_of_the_prompt_change_nothing(attention: str, chunk: int) -> None:
    model, tokenizer = ready(attention), letters()
    want = Generator(model, tokenizer).complete(ask(logprobs=1))
    got = Generator(model, tokenizer, prefill_chunk=chunk).complete(ask(logprobs=1))
    assert got.token_ids == want.token_ids
    assert [t.logprob for t in got.tokens] == pytest.approx([t.logprob for t in want.tokens], abs=1e-4)


def test_it_stops_at_the_window() -> None:
    model, tokenizer = ready(), letters()
    window = model.config.max_position_embeddings
    for options in ({"max_tokens": 999}, {"max_tokens": None}):
        done = Generator(model, tokenizer).complete(ask(**options))
        assert len(done.tokens) == window - len(PROMPT)
        assert done.finish_reason == "length"
    last = Generator(model, tokenizer).complete(ask((1,) * (window - 1)))
    assert len(last.tokens) == 1
    with pytest.raises(RequestError, match="shorten the prompt to at most 31"):
        Generator(model, tokenizer).stream(ask((1,) * window))  # at once, not with the first token


def test_the_end_of_text_ends_it() -> None:
    model, tokenizer = ready(), letters()
    ended = Generator(model, tokenizer).complete(ask(ignore_eos=False, logit_bias={tokenizer.eos_id: 100.0}))
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([tokenizer.eos_id], "", "stop")
    later = Generator(model, tokenizer).complete(
        ask(ignore_eos=False, min_tokens=4, logit_bias={tokenizer.eos_id: 100.0})
    )
    assert len(later.tokens) == 5
    assert later.token_ids.index(tokenizer.eos_id) == 4


def test_streaming_is_the_whole() -> None:
    model, tokenizer = ready(), letters()
    generator = Generator(model, tokenizer)
    outputs = list(generator.stream(ask(logprobs=2)))
    whole = generator.complete(ask(logprobs=2))
    assert tuple(outputs) == whole.tokens
    assert whole.text == tokenizer.decode(whole.token_ids)
    assert whole.prompt_ids == PROMPT


def test_a_caller_may_stop_asking_and_modes_stay() -> None:
    model, tokenizer = ready(), letters()
    generator = Generator(model, tokenizer)
    stream = generator.stream(ask())
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    stream.close()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        generator.stream(ask())


def test_requests_do_not_touch_each_other_or_the_generators_of_the_process() -> None:
    model, tokenizer = ready(), letters()
    generator = Generator(model, tokenizer)
    requests = [ask(seed=1), ask((4, 4, 4, 9, 1, 0, 2), seed=2), ask((8,), temperature=0)]
    before = torch.get_rng_state()
    together = generator.complete_all(requests)
    assert together == [generator.complete(r) for r in reversed(requests)][::-1]
    assert torch.equal(before, torch.get_rng_state())


def test_a_text_becomes_a_request() -> None:
    generator = Generator(ready(), letters())
    assert generator.request("abc", SamplingParams(seed=1), "x").prompt_ids == tuple(letters().encode("abc"))
    assert generator.request("").prompt_ids == (letters().eos_id,)


def test_bfloat16_keeps_a_bfloat16_cache() -> None:
    model, tokenizer = ready().to(torch.bfloat16), letters()
    generator = Generator(model, tokenizer)
    assert generator.caches(1, 5)[0].append(*(torch.zeros(1, 1, w) for w in (5, 6)))[0].dtype == torch.bfloat16
    assert len(generator.complete(ask()).tokens) == 13


def test_autocast_is_honoured() -> None:
    model, tokenizer = ready("gqa"), letters()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(Generator(model, tokenizer).complete(ask()).tokens) == 13


@pytest.mark.parametrize("chunk", [2, 3, 512])
def test_the_prompt_is_scored_as_one_pass_says(chunk: int) -> None:
    model, tokenizer = ready(), letters()
    done = Generator(model, tokenizer, prefill_chunk=chunk).complete(ask(prompt_logprobs=2, max_tokens=1))
    with torch.no_grad():
        known = model(torch.tensor([PROMPT]))[0].log_softmax(-1)
    assert done.prompt_scores is not None
    assert done.prompt_scores[0] is None
    assert len(done.prompt_scores) == len(PROMPT)
    for place, score in enumerate(done.prompt_scores[1:]):
        assert score is not None
        assert score.logprob == pytest.approx(float(known[place, PROMPT[place + 1]]), abs=1e-5)
        assert [i for i, _ in score.top_logprobs] == known[place].topk(2).indices.tolist()


def test_routing_is_that_of_the_place_before_a_token() -> None:
    model, tokenizer = ready(), letters()
    done = Generator(model, tokenizer).complete(replace(ask(), routing=True))
    row = torch.tensor([[*PROMPT, *done.token_ids]])
    with torch.no_grad():
        (report,) = model.trunk(row).routing
    for i, token in enumerate(done.tokens):
        (layer,) = token.routing
        assert layer.layer == 1
        place = len(PROMPT) + i - 1
        assert set(layer.experts) == set(report.experts[0, place].tolist())
        assert list(layer.weights) == sorted(layer.weights, reverse=True)
        assert sum(layer.weights) == pytest.approx(2.5, abs=1e-3)  # normalised, times routed_scaling_factor
    assert not Generator(model, tokenizer).complete(ask()).tokens[0].routing
