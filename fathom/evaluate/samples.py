"""Samples: what a model makes of some prompts, to read beside the curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fathom.generate.generator import Generator
from fathom.generate.request import SamplingParams
from fathom.model.transformer import Transformer
from fathom.runtime.seed import stream
from fathom.tokenizer.tokenizer import Tokenizer


def samples(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: SamplingParams,
    *,
    seed: int,
    step: int,
) -> list[tuple[str, str]]:
    """(prompt, continuation without the prompt) of each prompt; the model is in eval mode.

    Prompt i of a step has a seed of its own, made of (seed, step, i): a resumed run writes the same samples, and one
    prompt more changes none of the others. A prompt that leaves no room in the window for max_tokens loses its
    beginning, since samples must not end a training.
    """
    generator, window = Generator(model, tokenizer), model.config.max_position_embeddings
    keep = window - min(params.max_tokens or 1, window - 1)
    requests = []
    for i, prompt in enumerate(prompts):
        request = generator.request(prompt, replace(params, seed=stream(seed, "samples", step, i)))
        requests.append(replace(request, prompt_ids=request.prompt_ids[-keep:]))
    answers = generator.complete_all(requests)
    return [(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
