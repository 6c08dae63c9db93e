"""llama.cpp as a judge: the next token's log-probabilities of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.model.transformer import Transformer

LETTER = 65  # a token that is a whole character in every tokenizer of the tests
xllamacpp = pytest.importorskip("xllamacpp")


class Llama:
    """A GGUF file in llama.cpp, on one thread."""

    def __init__(self, file: Path, draft: bool = False) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
        params.cpuparams.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity = -1
        if draft:
            params.load_mtp = True
            params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        self.server = xllamacpp.Server(params)

    def next(self, prompt: str | list[int], vocabulary: int, best: int | None = None) -> Tensor:
        """Log-probabilities (V) of the token after a prompt; -inf beyond the `best` likeliest."""
        asked = {
            "prompt": prompt,
            "n_predict": 1,
            "temperature": 0.0,
            "n_probs": best or vocabulary,
            "cache_prompt": False,
        }
        asked["logit_bias"] = {str(LETTER): 1000.0}  # half a character would not be answered; probabilities stay raw
        said = self.server.handle_completions(asked)
        top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = torch.full((vocabulary,), float("-inf"))
        for entry in top:
            found[entry["id"]] = entry["logprob"]
        return found

    def text(self, prompt: list[int], length: int) -> dict[str, Any]:
        """The server's whole answer to a greedy completion."""
        asked = {"prompt": prompt, "n_predict": length, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        return dict(self.server.handle_completions(asked))


def wrong_by(model: Transformer, judge: Llama, prompts: list[list[int]]) -> float:
    """The largest difference of a log-probability after any of the prompts."""
    size = model.config.vocab_size or 0
    worst = 0.0
    with torch.no_grad():
        for prompt in prompts:
            ours = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
            worst = max(worst, float((ours - judge.next(prompt, size)).abs().max()))
    return worst
