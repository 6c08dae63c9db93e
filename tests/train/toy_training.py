"""A toy run with everything that a real one has: dropout (chance), a routed layer with a selection bias, MTP sums, an
evaluation and samples. As a script: python toy_training.py FOLDER [--resume] [--key value ...], to be killed."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.batch import IGNORE, Batch
from fathom.optim.build import AdamWConfig, MuonConfig, build_optimizer
from fathom.optim.schedule import WSDConfig, build_schedule
from fathom.runtime.device import Device
from fathom.runtime.seed import generator, seed_everything
from fathom.runtime.world import World
from fathom.train.checkpoint import RunFolder
from fathom.train.metrics import LoggingConfig, build_callbacks
from fathom.train.trainer import Finish, Trainer, TrainingConfig

VOCAB, WIDTH, EXPERTS = 31, 12, 3


class Toy(nn.Module):
    """tokens (B, T) -> hidden, logits and a routing report."""

    def __init__(self, seed: int = 0, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.empty(EXPERTS, WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.dropout = dropout
        self.register_buffer("bias", torch.zeros(EXPERTS))
        own = generator(seed, "init")
        with torch.no_grad():
            for weight in self.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.3, generator=own)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        h = F.dropout(self.embed_tokens(tokens), self.dropout, self.training)
        scores = self.gate(h).float().sigmoid()
        chosen = (scores + self.bias).argmax(-1)
        weight = scores.gather(-1, chosen.unsqueeze(-1))
        every = torch.einsum("btd,edf->btef", h, self.experts.to(h.dtype))
        picked = every.gather(2, chosen[..., None, None].expand(*chosen.shape, 1, WIDTH)).squeeze(2)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        mean = scores.mean((0, 1)) / scores.mean((0, 1)).sum()
        report = SimpleNamespace(
            layer=1, counts=counts, dropped=counts.new_zeros(()), entropy=-(mean * mean.log()).sum().detach()
        )
        return self.lm_head(self.norm(h + picked * weight)), report

    def balance_step(self, counts: dict[int, Tensor], progress: float) -> None:
        load = counts[1].float()
        self.bias += 0.01 * (1 - progress) * (load.mean() - load).sign()


@dataclass
class ToyLosses:
    total: Tensor
    next_token: Tensor
    tokens: Tensor
    mtp: Tensor
    mtp_tokens: Tensor
    balance: Tensor
    routing: tuple[Any, ...]


def objective(model: nn.Module, batch: Batch, *, token_count: int, batch_share: float, progress: float) -> ToyLosses:
    logits, report = model(batch.tokens)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    balance = 0.01 * logits.float().logsumexp(-1).square().mean()
    return ToyLosses(
        total=nats / token_count + batch_share * balance,
        next_token=nats.detach(),
        tokens=(batch.targets != IGNORE).sum(),
        mtp=(nats.detach() * 2).reshape(1),
        mtp_tokens=(batch.targets != IGNORE).sum().reshape(1),
        balance=balance.detach(),
        routing=(report,),
    )


class ToyLoader:
    """Micro-batch i is a pure function of i; rank r of n has its rows r, r + 1, ... of the whole."""

    def __init__(self, rows: int = 4, length: int = 7, rank: int = 0, size: int = 1, ragged: bool = False) -> None:
        self.rows, self.length, self.rank, self.size, self.ragged = rows, length, rank, size, ragged
        self.index = 0

    def __iter__(self) -> ToyLoader:
        return self

    def __next__(self) -> Batch:
        own = generator(7, "data", self.index)
        # the next token follows from the one before, so that there is something to learn
        text = torch.randint(VOCAB, (self.rows, 1), generator=own) + 3 * torch.arange(self.length + 1)
        text = text % VOCAB
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].clone()
        if self.ragged:
            targets[: 1 + self.index % self.rows, 2 + self.index % 3 :] = IGNORE
        self.index += 1
        share = slice(self.rank * self.rows // self.size, (self.rank + 1) * self.rows // self.size)
        positions = torch.arange(self.length).expand_as(tokens)
        return Batch(tokens[share], targets[share], positions[share])

    @property
    def epoch(self) -> float:
        return self.index / 16

    def state_dict(self) -> dict[str, Any]:
        return {"micro_index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["micro_index"]


def toy_trainer(
    folder: Path | None = None,
    *,
    resume: bool | int = False,
    pause: float = 0.0,
    kind: str = "muon",
    dtype: torch.dtype = torch.float32,
    loader: Any = None,
    world: World | None = None,
    model: nn.Module | None = None,
    dropout: float = 0.1,
    logging: LoggingConfig | None = None,
    goal: Any = objective,
    callbacks: Any = None,
    **training: Any,
) -> Trainer:
    """A trainer of the toy, new or taken up."""
    settings = {"max_steps": 12, "logging_steps": 3, "save_steps": 4, "eval_steps": 5, "sample_frequency": 5}
    config = TrainingConfig(**{**settings, "gradient_accumulation_steps": 2, "seed": 5, **training})
    seed_everything(config.seed, "dropout")
    model = model or Toy(config.seed, dropout)
    device = Device(torch.device("cpu"), "toy", dtype, emulates=dtype == torch.float16)
    recipe = MuonConfig(kind="muon", lr=0.02) if kind == "muon" else AdamWConfig(lr=0.02)
    optimizer = build_optimizer(model, recipe)
    schedule = build_schedule(WSDConfig(kind="wsd", warmup_steps=2), config.max_steps, recipe.lr)
    loader = loader or ToyLoader()
    run = None
    if folder is not None:
        first = world is None or world.is_first
        run = RunFolder(folder) if not first else RunFolder.open(folder) if resume else RunFolder.create(folder)
    if callbacks is None and run is not None:
        callbacks = build_callbacks(
            logging or LoggingConfig(progress="quiet", hardware_seconds=0),
            run.path,
            logging_steps=config.logging_steps,
            max_steps=config.max_steps,
            flops_per_token=1e6,
            peak_flops=1e11,
        )

    def evaluate() -> Any:
        torch.rand(1)  # looking at a model may use chance, and must not change the run
        batch = next(ToyLoader())
        loss = objective(model, batch, token_count=batch.target_count, batch_share=0, progress=0).total
        return SimpleNamespace(loss=float(loss), bits_per_byte=None)

    def goal_with_pause(*args: Any, **named: Any) -> Any:
        time.sleep(pause)
        return goal(*args, **named)

    trainer = Trainer(
        config,
        model,
        goal_with_pause,
        optimizer,
        schedule,
        loader,
        device,
        world=world,
        folder=run,
        evaluate=evaluate,
        sample=lambda step: [('a, "b"\n', f"text of step {step}\nline two")],
        after_step=[model.balance_step] if isinstance(model, Toy) else [],
        biases=(lambda: {1: model.bias}) if isinstance(model, Toy) else None,
        callbacks=callbacks or [],
    )
    if resume and run is not None and run.begun:
        trainer.resume(run.latest() if resume is True else run.at(resume))
    return trainer


def main() -> Finish:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--kind", default="muon")
    parser.add_argument("--max-steps", type=int, default=12)
    parser.add_argument("--save-steps", type=int, default=4)
    parser.add_argument("--limit", type=int, help="largest file, in bytes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (options.limit, options.limit))
    trainer = toy_trainer(
        options.folder,
        resume=options.resume,
        pause=options.pause,
        kind=options.kind,
        max_steps=options.max_steps,
        save_steps=options.save_steps,
    )
    print("ready", flush=True)
    return trainer.run()


if __name__ == "__main__":
    from fathom.errors import UserError

    try:
        code = main().exit_code
    except UserError as error:
        print(f"error: {error}", flush=True)
        code = 2
    os._exit(code)
