"""llama.cpp's server in this process (`xllamacpp`), asked as its own clients ask it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp as x

PACKAGES = ("xllamacpp",)
LETTER = 1000.0  # a bias that no logit stands against


class Decoder:
    """job: model is a GGUF file; letter: a token that is one whole character."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.letter = str(job["letter"])
        params = x.CommonParams()
        params.model.path = job["model"]
        params.n_parallel = job["rows"]
        params.n_ctx = job["rows"] * (job["window"] + 8)
        params.n_batch = params.n_ubatch = 512
        params.n_gpu_layers, params.warmup, params.verbosity = 0, True, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
        params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO
        if job["weights"] == "float32":
            params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = x.Server(params)
        self.pool = ThreadPoolExecutor(job["rows"])
        kinds = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
        cache = "F32" if job["weights"] == "float32" else "F16"
        self.setting = {"weights": kinds[job["weights"]], "cache": cache, "threads": job["threads"]}

    def _ask(self, prompt: list[int], new: int, **more: Any) -> Any:
        return self.server.handle_completions(
            {"prompt": prompt, "n_predict": new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False, **more}
        )

    def answer(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """All rows at once. Answers come whole; when a row's first token came is what the server itself noted. For the
        tokens there is `tokens`."""
        start = time.perf_counter()
        said = list(self.pool.map(lambda prompt: self._ask(prompt, new), prompts))
        whole = time.perf_counter() - start
        timings = [each["timings"] for each in said]
        short = [each["predicted_n"] for each in timings if each["predicted_n"] != new]
        if short:
            raise RuntimeError(f"{new} tokens were asked for and {short[0]} came")
        return {"whole": whole, "each": [each["predicted_ms"] / 1000 for each in timings], "tokens": None}

    def tokens(self, prompt: list[int], new: int) -> list[int]:
        """Greedy tokens, for comparison: one request each, since half a character would not be told; a letter is forced
        with a bias, and the probabilities stay those of the model."""
        found: list[int] = []
        for _ in range(new):
            said = self.server.handle_completions(
                {"prompt": [*prompt, *found], "n_predict": 1, "temperature": 0.0, "n_probs": 2,
                 "logit_bias": {self.letter: LETTER}}
            )  # fmt: skip
            top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            told = [(entry["id"], entry["logprob"]) for entry in top if entry["logprob"] is not None]
            found.append(int(max(told, key=lambda pair: pair[1])[0]))
        return found
