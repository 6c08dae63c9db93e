"""How well a model predicts a text.

    loss             sum of nats / targets                      nats a token
    perplexity       exp(loss)                                  a token
    bits per byte    sum of nats / (ln 2 * bytes)               whatever the tokenizer
    word perplexity  exp(sum of nats / words)                   whatever the tokenizer

Bytes are those of the targets in UTF-8, words those that begin in targets (`text.py`). An end-of-text target is a token
like any other, its nats count, and it has no bytes and no words. Sums are float64, over all batches and ranks.

    MTP loss         of depth k: sum of nats / targets of that depth
    MTP acceptance   of depth k: how often its likeliest token for t_i+k+1 is the main model's, which has seen t_i+k
                     by then: what greedy speculation would accept, every token before being right
    MaxVio           (max load - mean load) / mean load of an MoE layer over the whole text ("global")
    entropy          of the mean gate distribution of a batch, mean over tokens, in nats; ln E at best
    dead             experts that no token chose
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.batch import IGNORE, Batch
from fathom.errors import DataError
from fathom.evaluate.text import TextTable
from fathom.model.linear import product
from fathom.model.loss import chunk_rows, mtp_targets
from fathom.model.moe.balance import RoutingReport, max_vio
from fathom.model.precision import widen
from fathom.model.transformer import Transformer
from fathom.runtime.world import World


@dataclass(frozen=True)
class Ahead:
    """One MTP depth: nats a target, how many targets, and the share of them that speculation would accept."""

    loss: float
    tokens: int
    acceptance: float


@dataclass(frozen=True)
class LayerBalance:
    """One MoE layer over the whole text; MTP depth k is layer num_hidden_layers + k."""

    layer: int
    counts: tuple[int, ...]
    entropy: float

    @property
    def max_vio(self) -> float:
        """(max load - mean load) / mean load."""
        return max_vio(torch.tensor(self.counts))

    @property
    def dead(self) -> int:
        """Experts that no token chose."""
        return self.counts.count(0)


@dataclass(frozen=True)
class Measured:
    """nats: their sum over targets; tokens: targets; bytes, words: of them, None where the tokenizer is not known."""

    nats: float
    tokens: int
    bytes: int | None
    words: int | None
    mtp: tuple[Ahead, ...]
    routing: tuple[LayerBalance, ...]

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """A token."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """None if the targets have no bytes."""
        return self.nats / (math.log(2) * self.bytes) if self.bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """None if the targets have no words."""
        return _exp(self.nats / self.words) if self.words else None

    @property
    def mtp_loss(self) -> float | None:
        """Mean over depths; None without MTP."""
        depths = [depth.loss for depth in self.mtp if depth.tokens]
        return sum(depths) / len(depths) if depths else None

    @property
    def mtp_acceptance(self) -> float | None:
        """Of the first depth; None without MTP."""
        return self.mtp[0].acceptance if self.mtp and self.mtp[0].tokens else None

    @property
    def max_vio(self) -> float | None:
        """Mean over the MoE layers, as in the loss-free paper; None without MoE."""
        return sum(layer.max_vio for layer in self.routing) / len(self.routing) if self.routing else None

    def facts(self) -> dict[str, Any]:
        """Everything as JSON has it: plain numbers, and None for what is not known or not finite."""
        depths = [{"loss": _finite(d.loss), "tokens": d.tokens, "acceptance": d.acceptance} for d in self.mtp]
        layers = [
            {
                "layer": layer.layer,
                "max_vio": layer.max_vio,
                "entropy": _finite(layer.entropy),
                "dead": layer.dead,
                "counts": list(layer.counts),
            }
            for layer in self.routing
        ]
        return {
            "loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "word_perplexity": _finite(self.word_perplexity),
            "bits_per_byte": _finite(self.bits_per_byte),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "mtp_loss": _finite(self.mtp_loss),
            "mtp_acceptance": self.mtp_acceptance,
            "mtp": depths,
            "max_vio": self.max_vio,
            "layers": layers,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _exp(nats: float) -> float:
    return math.exp(nats) if not nats > 700 else math.inf


@torch.no_grad()
def measure(
    model: Transformer,
    batches: Iterable[Batch],
    token_bytes: Sequence[bytes] | None = None,
    *,
    world: World | None = None,
    ahead: bool = True,
) -> Measured:
    """Read batches and add up what the head of this file has. The model is in eval mode; it and all random generators
    stay as they are. Autocast, if any, is the caller's.

    token_bytes: `Tokenizer.token_bytes`; None: no bytes and words. world: adds up over ranks, each with batches of its
    own (perhaps none). ahead: measure the MTP depths too; False leaves their work undone. DataError: not one target.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before measuring")
    device = model.embed_tokens.weight.device
    table = None if token_bytes is None else TextTable(token_bytes, model.embed_tokens.num_embeddings, device)
    sums = _Sums(model, len(model.mtp) if ahead else 0)
    for batch in batches:
        sums.add(batch.to(device), table)
    found = sums.over(world or World(), device)
    if not found.tokens:
        raise DataError("There is no text to measure: not one token has a token before it. Give a longer text.")
    return found if table is not None else replace(found, bytes=None, words=None)


class _Sums:
    """What is added up, batch by batch."""

    def __init__(self, model: Transformer, depths: int) -> None:
        self.model = model
        read = model.config.num_hidden_layers + depths
        layers = {n: layer for n, layer in model.moe_layers().items() if n < read}
        self.counts = {n: [0] * layer.config.n_routed_experts for n, layer in sorted(layers.items())}
        self.entropy = dict.fromkeys(self.counts, 0.0)
        self.routed = dict.fromkeys(self.counts, 0)
        self.nats, self.tokens, self.bytes, self.words = 0.0, 0, 0, 0
        self.mtp = [[0.0, 0, 0] for _ in range(depths)]  # nats, targets, accepted

    def add(self, batch: Batch, table: TextTable | None) -> None:
        hidden, reports = self.model.trunk(batch.tokens, batch.positions, batch.segments)
        nats, main = read_head(hidden, self.model.head_weight, batch.targets, best=bool(self.mtp))
        self.nats += nats
        self.tokens += batch.target_count
        if table is not None:
            size, words = table.count(batch)
            self.bytes, self.words = self.bytes + int(size), self.words + int(words)
        for report in (*reports, *self._ahead(batch, hidden, main)):
            self._route(report)

    def _ahead(self, batch: Batch, hidden: Tensor, main: Tensor) -> list[RoutingReport]:
        """Every MTP depth; main (B, T): the likeliest next tokens of the main model."""
        reports = []
        for depth, sums in enumerate(self.mtp, start=1):
            rest = batch.tokens.shape[1] - depth
            if rest < 1:
                break
            segments = None if batch.segments is None else batch.segments[:, :rest]
            hidden, report = self.model.look_ahead(
                depth, hidden[:, :rest], batch.tokens[:, depth:], batch.positions[:, :rest], segments
            )
            targets = mtp_targets(batch, depth)
            nats, likeliest = read_head(hidden, self.model.head_weight, targets, best=True)
            counted = targets != IGNORE
            sums[0] += nats
            sums[1] += int(counted.sum())
            sums[2] += int(((likeliest == main[:, depth:]) & counted).sum())
            if report is not None:
                reports.append(report)
        return reports

    def _route(self, report: RoutingReport) -> None:
        counts = report.counts.tolist()
        assignments = sum(counts)
        if not assignments:
            return
        self.counts[report.layer] = [a + b for a, b in zip(self.counts[report.layer], counts, strict=True)]
        self.entropy[report.layer] += float(report.entropy) * assignments
        self.routed[report.layer] += assignments

    def over(self, world: World, device: torch.device) -> Measured:
        """The sums of all ranks, in one message."""
        flat = [self.nats, self.tokens, self.bytes, self.words]
        flat += [number for depth in self.mtp for number in depth]
        for layer, counts in self.counts.items():
            flat += [self.entropy[layer], self.routed[layer], *counts]
        numbers = iter(world.sums(flat, device))

        def take(count: int) -> list[float]:
            return [next(numbers) for _ in range(count)]

        nats, tokens, size, words = take(4)
        mtp = []
        for _ in self.mtp:
            total, targets, accepted = take(3)
            mtp.append(Ahead(total / max(targets, 1), int(targets), accepted / max(targets, 1)))
        routing = []
        for layer, counts in self.counts.items():
            entropy, routed = take(2)
            routing.append(LayerBalance(layer, tuple(int(n) for n in take(len(counts))), entropy / max(routed, 1)))
        return Measured(nats, int(tokens), int(size), int(words), tuple(mtp), tuple(routing))


def read_head(hidden: Tensor, weight: Tensor, targets: Tensor, *, best: bool) -> tuple[float, Tensor]:
    """(sum of nats over targets that are not IGNORE, likeliest tokens (B, T), empty unless asked for).

    hidden (B, T, D), weight (V, D), targets (B, T); a chunk of logits at a time, each computed once for both.
    """
    chunk = chunk_rows(weight.shape[0])
    total, likeliest = 0.0, []
    for rows, wanted in zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True):
        logits = widen(product(rows, weight))
        nats = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none")
        total += float(nats.double().sum())
        if best:
            likeliest.append(logits.argmax(-1))
    return total, torch.cat(likeliest).view(targets.shape) if best else targets.new_empty(0)
