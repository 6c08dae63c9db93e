"""vLLM's `LLM`, in this process. Its CPU build has MLA for latents of 512 + 64 only; others run as plain attention."""

from __future__ import annotations

import json
import os
import time
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams

PACKAGES = ("vllm", "vllm-cpu")


class Decoder:
    """Greedy, past any end of text, without its prefix cache (every prompt here is new)."""

    def __init__(self, job: dict[str, Any]) -> None:
        with open(os.path.join(job["model"], "config.json"), encoding="utf-8") as file:
            keys = json.load(file)
        mla = (keys.get("kv_lora_rank"), keys.get("qk_rope_head_dim")) == (512, 64)
        if not mla:
            os.environ["VLLM_MLA_DISABLE"] = "1"
        self.engine = LLM(
            model=job["model"],
            skip_tokenizer_init=True,
            dtype=job["weights"],
            enforce_eager=True,
            max_model_len=job["window"],
            max_num_seqs=job["rows"],
            enable_prefix_caching=False,
            disable_log_stats=False,  # the times of tokens are among them
            compilation_config={"custom_ops": ["none"]},
        )
        self.setting = {"weights": job["weights"], "attention": "MLA" if mla else "as multi-head", "eager": True}

    def answer(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """All rows at once. Answers come whole; when a row's first token came is what the engine itself noted."""
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        said = self.engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        whole = time.perf_counter() - start
        each = [one.metrics.last_token_ts - one.metrics.first_token_ts for one in said]
        return {"whole": whole, "each": each, "tokens": [list(one.outputs[0].token_ids) for one in said]}
