from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from tiny_models import ATTENTIONS, MOES, tiny_model
from tiny_text import PROMPT, ask, letters, ready

from fathom.errors import RequestError
from fathom.generate.generator import Generator
from fathom.generate.request import Request, SamplingParams
from fathom.generate.sampling import Turn, adjust, distribution
from fathom.generate.speculative import Draft, Drafter, SpeculativeGenerator, probabilities, propose, verify
from fathom.model.transformer import Transformer
from fathom.tokenizer.train import character


def eager_to_please(depths: int, moe: str = "v3", attention: str = "mla_low_rank") -> Transformer:
    """A model whose MTP depths are often right: what stands next to each other has a say in what follows, in all."""
    model = ready(attention, moe, depths, tie_word_embeddings=True)
    with torch.no_grad():
        for layer in (*model.layers, *(m.block for m in model.mtp)):
            layer.self_attn.o_proj.weight.mul_(0.1)
        for mtp in model.mtp:
            mtp.eh_proj.weight.copy_(torch.cat((torch.eye(20), torch.zeros(20, 20)), 1))
        model.embed_tokens.weight.mul_(2)
    return model


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
            drafts = [d.token for d in drafter.drafts(answer)]
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


def chi_square(counts: Counter, expected: dict, n: int) -> float:
    return sum((counts[k] - n * p) ** 2 / (n * p) for k, p in expected.items() if n * p > 0)


def test_verifying_keeps_the_distribution() -> None:
    generator = torch.Generator().manual_seed(3)
    main, mtp = torch.randn(2, 5, generator=generator) * 1.5
    n, counts, accepted = 2000, Counter(), 0  # type: ignore[var-annotated]
    for seed in range(n):
        turn = Turn(SamplingParams(temperature=0.9), seed, (1,), (), frozenset())
        choice, right = verify(main, propose(mtp, turn), turn)
        counts[choice.token] += 1
        accepted += right
    p, q = (probabilities(z, turn) for z in (main, mtp))
    assert chi_square(counts, dict(enumerate(p.tolist())), n) < 23.5  # 4 degrees of freedom, 1 in 10,000
    agree = float(torch.minimum(p, q).sum())
    assert 0.2 < agree < 0.9
    assert accepted / n == pytest.approx(agree, abs=0.04)


def test_a_draft_that_cannot_be_is_never_accepted() -> None:
    turn = Turn(SamplingParams(top_k=1), 0, (1,), (), frozenset())
    main, mtp = torch.tensor([0.0, 5.0, 1.0]), torch.tensor([5.0, 0.0, 0.0])
    assert verify(main, propose(mtp, turn), turn)[0].token == 1
    same = Draft(1, probabilities(main, turn))
    assert verify(main, same, turn) == (verify(main, same, turn)[0], True)


def test_sampled_text_is_distributed_as_without_speculation() -> None:
    """All texts of three tokens, their probabilities by enumeration, against many seeds."""
    tokenizer = character("ab")
    model = tiny_model("mla", "dense", 2, vocab_size=4, num_hidden_layers=1, seed=3).eval()
    prompt, n = (0, 1, 1), 220
    params = SamplingParams(max_tokens=4, temperature=1.3, ignore_eos=True, frequency_penalty=0.4)
    expected = {}
    with torch.no_grad():
        for text in itertools.product(range(4), repeat=3):
            p = 1.0
            for place, token in enumerate(text):
                turn = Turn(params, 0, prompt, text[:place], frozenset())
                logits = model(torch.tensor([[*prompt, *text[:place]]]))[0, -1]
                w = distribution(adjust(logits, turn), params)
                p *= float(w[token] / w.sum())
            expected[text] = p
    generator = SpeculativeGenerator(model, tokenizer)
    counts, drafted, accepted = Counter(), 0, 0  # type: ignore[var-annotated]
    for seed in range(n):
        done = generator.complete(Request(prompt, SamplingParams.of({**vars(params), "seed": seed})))
        counts[tuple(done.token_ids[:3])] += 1
        drafted, accepted = drafted + done.drafted, accepted + done.accepted
    assert 0.2 < accepted / drafted < 0.95
    common = {k: p for k, p in expected.items() if n * p > 4}
    rest = 1 - sum(common.values())
    counts["rest"] = n - sum(counts[k] for k in common)
    assert chi_square(counts, {**common, "rest": rest}, n) < len(common) + 4 * (2 * len(common)) ** 0.5


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
