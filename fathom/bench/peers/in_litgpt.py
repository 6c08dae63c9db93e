"""litgpt in training: a dense model in the manner of nanoGPT and Llama, with the weights that a token of ours uses."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy

PACKAGES = ("litgpt",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dense(shape: dict[str, int], active: int) -> Config:
    """Llama's blocks at our width and depth; the width of the network makes up the number of weights. Its head is not
    tied: weights that are looked up count no more there than here."""
    width, layers, heads = shape["hidden_size"], shape["layers"], shape["heads"]
    spent = shape["vocab_size"] * width + layers * 4 * width * width
    inner = max(64, round((active - spent) / (3 * width * layers)))
    return Config(
        name="dense", block_size=shape["length"], n_layer=layers, n_embd=width, n_head=heads, n_query_groups=heads,
        vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"], intermediate_size=inner,
        mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", rotary_percentage=1.0, parallel_residual=False,
        bias=False,
    )  # fmt: skip


class Trainer:
    """float32 weights and autocast, fused AdamW. job: also shape and active."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        config = dense(job["shape"], job["active"])
        torch.manual_seed(0)
        self.model: Any = GPT(config)
        self.dtype = DTYPES[job["precision"]]
        self.tokens = torch.from_numpy(np.load(job["tokens"]).astype(np.int64))
        self.rows, self.micro_batches, self.clip, self.next = job["rows"], job["micro_batches"], job["clip"], 0
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=job["lr"], betas=tuple(job["betas"]), eps=job["eps"],
            weight_decay=job["weight_decay"], fused=True,
        )  # fmt: skip
        looked_up = self.model.transformer.wte.weight.numel()
        self.setting = {
            "precision": f"{job['precision']} autocast" if job["precision"] != "float32" else "float32",
            "model": f"another: dense, {sum(w.numel() for w in self.model.parameters()) - looked_up:,} weights in use",
        }

    def step(self) -> dict[str, Any]:
        """One optimizer step."""
        start, loss = time.perf_counter(), 0.0
        for _ in range(self.micro_batches):
            first = self.next * self.rows % len(self.tokens)
            self.next += 1
            part = self.tokens[first : first + self.rows]
            with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(part[:, :-1])
                each = chunked_cross_entropy(logits, part[:, 1:], chunk_size=0)
            (each / self.micro_batches).backward()
            loss += float(each.detach()) / self.micro_batches
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - start, "loss": loss, "parts": {}}

    def state_bytes(self) -> int:
        """Weights, gradients and moments, float32."""
        return 16 * sum(weight.numel() for weight in self.model.parameters())

    def peak_on_device(self) -> int:
        """It runs on the CPU here."""
        return 0
