"""What runs inside an engine's own interpreter: `PYTHON inside.py JOB ANSWER`, both JSON files.

    job     {engine, path, prompts: [[id, ...], ...], length, best, letter}
    answer  {version, runs: [{tokens: [id, ...], logprobs: [[[id, logprob], ...], ...]}, ...]}      or {missing: module}

Every engine continues each prompt greedily by `length` tokens, end of text or not, and tells the `best` likeliest at
each step. Nothing of Fathom is imported here, since that interpreter need not have it; and a process of its own keeps
an engine's crash away from ours.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

Job = dict[str, Any]
Run = dict[str, Any]


def _likeliest(logprobs: Any, best: int) -> list[list[float]]:
    """A row of log-probabilities (V), as a numpy array -> its largest, largest first."""
    order = (-logprobs).argsort()[:best]
    return [[int(i), float(logprobs[i])] for i in order]


def in_transformers(job: Job) -> Iterator[Run]:
    """`generate`, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.float32, experts_implementation="eager")
    model.eval()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": job["length"], "do_sample": False, "pad_token_id": 0}
    for prompt in job["prompts"]:
        row = torch.tensor([prompt])
        said = model.generate(
            row, attention_mask=torch.ones_like(row), return_dict_in_generate=True, output_logits=True, **options
        )
        rows = torch.cat(said.logits).float().log_softmax(-1).numpy()
        tokens = said.sequences[0, len(prompt) :].tolist()
        yield {"tokens": tokens, "logprobs": [_likeliest(row, job["best"]) for row in rows]}


def in_mlx(job: Job) -> Iterator[Run]:
    """A token at a time with mlx-lm's own cache, on the CPU, whose experts know float32 only."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    from pathlib import Path

    model, _ = load_model(Path(job["path"]))
    model.set_dtype(mx.float32)
    for prompt in job["prompts"]:
        cache, fresh = make_prompt_cache(model), list(prompt)
        run: Run = {"tokens": [], "logprobs": []}
        for _ in range(job["length"]):
            logits = model(mx.array([fresh]), cache=cache)[0, -1]
            row = np.array(logits - mx.logsumexp(logits))
            run["logprobs"].append(_likeliest(row, job["best"]))
            fresh = [int(row.argmax())]
            run["tokens"] += fresh
        yield run


def in_llama_cpp(job: Job) -> Iterator[Run]:
    """A request a token, since half a character would not be answered: the letter is forced with a bias, and the
    probabilities stay those of the model. The server's own cache holds what was read."""
    import xllamacpp as x

    params = x.CommonParams()
    params.model.path = job["path"]
    params.n_ctx = max(map(len, job["prompts"])) + job["length"] + 8
    params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 1, 0, False, -1
    params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
    server = x.Server(params)
    asked = {"n_predict": 1, "temperature": 0.0, "n_probs": job["best"], "logit_bias": {str(job["letter"]): 1000.0}}
    for prompt in job["prompts"]:
        run: Run = {"tokens": [], "logprobs": []}
        for _ in range(job["length"]):
            said = server.handle_completions({"prompt": [*prompt, *run["tokens"]], **asked})
            top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            told = [[entry["id"], entry["logprob"]] for entry in top if entry["logprob"] is not None]
            run["logprobs"].append(told)
            run["tokens"].append(max(told, key=lambda pair: pair[1])[0])
        yield run


def in_vllm(job: Job) -> Iterator[Run]:
    """`LLM.generate` in float32. Its CPU build has MLA for latents of 512 + 64 only; others run as plain attention."""
    with open(os.path.join(job["path"], "config.json"), encoding="utf-8") as file:
        keys = json.load(file)
    if (keys.get("kv_lora_rank"), keys.get("qk_rope_head_dim")) not in ((None, None), (512, 64)):
        os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=job["path"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=max(map(len, job["prompts"])) + job["length"],
        max_num_seqs=4,
        compilation_config={"custom_ops": ["none"]},
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=job["length"], ignore_eos=True, logprobs=job["best"], detokenize=False
    )
    for said in engine.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], params):
        done = said.outputs[0]
        rows = [[[int(i), float(found.logprob)] for i, found in row.items()] for row in done.logprobs]
        yield {"tokens": list(done.token_ids), "logprobs": rows}


ENGINES: dict[str, tuple[str, str, Callable[[Job], Iterator[Run]]]] = {  # name: (module, package, what runs it)
    "transformers": ("transformers", "transformers", in_transformers),
    "llama.cpp": ("xllamacpp", "xllamacpp", in_llama_cpp),
    "mlx-lm": ("mlx_lm", "mlx-lm", in_mlx),
    "vllm": ("vllm", "vllm", in_vllm),
}


def answer(job: Job) -> dict[str, Any]:
    """Do a job."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    module, package, run = ENGINES[job["engine"]]
    if find_spec(module) is None:
        return {"missing": module}
    told = None
    for name in (package, f"{package}-cpu"):
        try:
            told = told or version(name)
        except PackageNotFoundError:
            continue
    return {"version": told, "runs": list(run(job))}


def main() -> None:
    """The script."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]  # our names hide nobody's
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    done = answer(job)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(done, file)


if __name__ == "__main__":
    main()
