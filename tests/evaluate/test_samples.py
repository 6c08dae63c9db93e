from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_models import VOCABULARY, tiny_model

from fathom.evaluate.samples import samples
from fathom.generate.request import SamplingParams
from fathom.tokenizer.train import character

PARAMS = SamplingParams(max_tokens=7, temperature=0.9)


def test_samples_belong_to_seed_step_and_place() -> None:
    model, tokenizer = tiny_model().eval(), character("abcdefghijklmnopqrstuvwxyz ")
    assert tokenizer.vocab_size == VOCABULARY
    before = torch.get_rng_state()
    first = samples(model, tokenizer, ["abc", "abc", ""], PARAMS, seed=1, step=10)
    assert torch.equal(before, torch.get_rng_state())
    assert [p for p, _ in first] == ["abc", "abc", ""]
    assert len({t for _, t in first}) == 3
    assert samples(model, tokenizer, ["abc", "x"], PARAMS, seed=1, step=10)[0] == first[0]
    assert samples(model, tokenizer, ["abc"], PARAMS, seed=1, step=11)[0] != first[0]
    assert samples(model, tokenizer, ["abc"], PARAMS, seed=2, step=10)[0] != first[0]


def test_a_prompt_that_fills_the_window_still_gives_a_sample() -> None:
    model, tokenizer = tiny_model().eval(), character("abcdefghijklmnopqrstuvwxyz ")
    prompt = "abcdefgh " * 9
    params = SamplingParams(max_tokens=7, ignore_eos=True, logit_bias={3: 100.0}, temperature=0)
    assert samples(model, tokenizer, [prompt], params, seed=0, step=0) == [(prompt, "c" * 7)]
    many = SamplingParams(max_tokens=None, ignore_eos=True, logit_bias={3: 100.0}, temperature=0)
    assert samples(model, tokenizer, [prompt], many, seed=0, step=0) == [(prompt, "c")]
