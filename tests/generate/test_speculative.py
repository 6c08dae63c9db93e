from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import ATTENTIONS, MOES
from tiny_text import PROMPT, ask, eager_to_please, letters, ready

from fathom.errors import RequestError
from fathom.generate.generator import Generator
from fathom.generate.speculative import Drafter, SpeculativeGenerator


@pytest.mark.parametrize(("attention", "moe"), [(a, m) for a in ATTENTIONS for m in MOES])
def test_greedy_is_the_plain_loop(attention: str, moe: str) -> None:
    tokenizer = letters()
    for depths in (1, 3):
        model = ready(attention, moe, depths)
        request = ask(temperature=0, max_tokens=None)
        plain = Generator(model, tokenizer).complete(request)
        got = SpeculativeGenerator(model, tokenizer).complete(request)
        assert got.token_ids == plain.token_ids
        assert (got.text, got.finish_reason) == (plain.text, "length")


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_greedy_with_accepted_drafts_and_every_option_is_the_plain_loop(depths: int) -> None:
    model, tokenizer = eager_to_please(depths), letters()
    accepted = 0
    for options in (
        {},
        {"repetition_penalty": 1.3, "logprobs": 2},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {5: 2.0}},
        {"ignore_eos": False, "min_tokens": 9, "logit_bias": {tokenizer.eos_id: 100.0}},
        {"stop": ["zz"], "max_tokens": 1},
    ):
        for prompt in (PROMPT, (4,)):
            request = ask(prompt, temperature=0, **{"max_tokens": None, **options})
            plain = Generator(model, tokenizer).complete(request)
            got = SpeculativeGenerator(model, tokenizer, prefill_chunk=2).complete(request)
            assert got.token_ids == plain.token_ids
            assert (got.text, got.finish_reason) == (plain.text, plain.finish_reason)
            for a, b in zip(got.tokens, plain.tokens, strict=True):
                assert a.logprob == (None if b.logprob is None else pytest.approx(b.logprob, abs=1e-4))
            accepted += got.accepted
    assert accepted > 15


def test_counts_are_those_of_the_passes_over_the_text() -> None:
    model, tokenizer = eager_to_please(1), letters()
    done = SpeculativeGenerator(model, tokenizer).complete(ask(temperature=0, max_tokens=None))
    row = torch.tensor([[*PROMPT, *done.token_ids]])
    length = row.shape[1]
    with torch.no_grad():
        hidden = model.trunk(row).hidden
        ahead, _ = model.look_ahead(1, hidden[:, :-1], row[:, 1:], torch.arange(length - 1)[None], None)
        right = (model.logits(ahead).argmax(-1) == model.logits(hidden).argmax(-1)[:, 1:])[0].tolist()
    drafted, accepted, last = 0, 0, len(PROMPT)  # last: the last token that is known
    while length - 1 - last >= 2:
        drafted, accepted, last = drafted + 1, accepted + right[last - 1], last + 1 + right[last - 1]
    assert (done.drafted, done.accepted) == (drafted, accepted)
    assert 0 < accepted <= drafted


def test_drafts_are_what_the_depths_say_of_the_whole_row() -> None:
    """The caches of the depths against look_ahead over everything at once."""
    model, tokenizer = ready(depths=3), letters()
    generator = SpeculativeGenerator(model, tokenizer, prefill_chunk=3)
    answer = generator.begin(ask(temperature=0, max_tokens=12))
    drafter, passes = Drafter(generator, 17), 0
    stream = Generator(model, tokenizer).run(answer)
    for _ in stream:
        ids = [*PROMPT, *answer.turn.output]
        row = torch.tensor([ids])
        with torch.no_grad():
            hidden = model.trunk(row[:, :-1]).hidden
            drafter.see(hidden[:, drafter.seen :])
            drafts = drafter.drafts(answer)
            row = torch.cat((row, torch.tensor([drafts], dtype=torch.long)), 1)
            length = hidden.shape[1]
            for depth, draft in enumerate(drafts, start=1):
                hidden, _ = model.look_ahead(
                    depth, hidden, row[:, depth : length + depth], torch.arange(length)[None], None
                )
                assert int(model.logits(hidden[0, -1]).argmax()) == draft
        passes += bool(drafts)
        assert len(drafts) == min(3, max(0, answer.left - 1))
    assert passes == 10


@pytest.mark.parametrize("depths", [1, 2])
def test_sampled_text_is_that_of_the_plain_loop(depths: int) -> None:
    """Not only its distribution: the same tokens, for every option that chance has a part in."""
    model, tokenizer = eager_to_please(depths), letters()
    accepted = 0
    for options in (
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5, "logprobs": 1},
        {"temperature": 1.0, "top_p": 0.8, "frequency_penalty": 0.4},
        {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.2},
    ):
        for seed in range(3):
            request = ask(**{**options, "seed": seed, "max_tokens": None})
            plain = Generator(model, tokenizer).complete(request)
            got = SpeculativeGenerator(model, tokenizer).complete(request)
            assert (got.token_ids, got.text) == (plain.token_ids, plain.text)
            assert sum(t.draft for t in got.tokens) == got.accepted
            accepted += got.accepted
    assert accepted > 20


def test_routing_and_scores_are_those_of_the_plain_loop() -> None:
    model, tokenizer = eager_to_please(2), letters()
    request = replace(ask(max_tokens=None, prompt_logprobs=2), routing=True)
    plain = Generator(model, tokenizer).complete(request)
    got = SpeculativeGenerator(model, tokenizer, prefill_chunk=2).complete(request)
    assert got.accepted
    for a, b in zip(got.tokens, plain.tokens, strict=True):
        assert [(r.layer, r.experts) for r in a.routing] == [(r.layer, r.experts) for r in b.routing]
    for a, b in zip(got.prompt_scores[1:], plain.prompt_scores[1:], strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_same_seed_same_text_and_no_other_generator_moves() -> None:
    generator = SpeculativeGenerator(ready(depths=2), letters())
    before = torch.get_rng_state()
    first = generator.complete(ask(temperature=1.1))
    assert first == generator.complete(ask(temperature=1.1))
    assert first.token_ids != generator.complete(ask(temperature=1.1, seed=6)).token_ids
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_without_depths_is_refused() -> None:
    with pytest.raises(RequestError, match="num_nextn_predict_layers"):
        SpeculativeGenerator(ready(depths=0), letters())


def test_a_cache_and_segments_exclude_each_other() -> None:
    model = ready()
    with pytest.raises(ValueError, match="together"):
        model.look_ahead(
            1, torch.zeros(1, 2, 20), torch.zeros(1, 2, dtype=torch.long), torch.arange(2)[None],
            torch.zeros(1, 2, dtype=torch.long), Generator(model, letters()).caches(1, 3)[0],
        )  # fmt: skip
