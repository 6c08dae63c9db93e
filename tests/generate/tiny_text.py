"""Tiny models with a tokenizer of their own: 27 characters, the unknown one and the end of text make VOCABULARY."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import torch
from tiny_models import VOCABULARY, tiny_model

from fathom.generate.request import Completion, Request, SamplingParams
from fathom.generate.sampling import choose
from fathom.model.transformer import Transformer
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.tokenizer.train import character

LETTERS = "abcdefghijklmnopqrstuvwxyz "
PROMPT = (3, 11, 7, 2, 20)


def letters() -> Tokenizer:
    tokenizer = character(LETTERS)
    assert tokenizer.vocab_size == VOCABULARY
    return tokenizer


def ready(attention: str = "mla_low_rank", moe: str = "v3", depths: int = 1, **changes: object) -> Transformer:
    return tiny_model(attention, moe, depths, **changes).eval()  # type: ignore[arg-type]


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


def ask(prompt: tuple[int, ...] = PROMPT, **options: object) -> Request:
    """A request that only its length ends, unless told otherwise."""
    return Request(prompt, SamplingParams.of({"ignore_eos": True, "max_tokens": 13, "seed": 5, **options}))


def without_cache(model: Transformer, tokenizer: Tokenizer, request: Request) -> Completion:
    """The slow twin of the loop: everything is computed again for every token."""
    from fathom.generate.answer import Answer

    answer = Answer(request, tokenizer, model.config.max_position_embeddings)
    with torch.no_grad():
        while not answer.finished:
            ids = [*request.prompt_ids, *answer.turn.output]
            answer.take(choose(model(torch.tensor([ids]))[0, -1], answer.turn))
    return answer.completion()
