"""A memory of the training text beside the network: what came after the last tokens, by counting.

    f_t = [log p_{K-1} ; log(1 + c_k) ; lambda_k]          of the contexts that end with token t (`counts.py`)
    h_0 = Emb(t) + W_f f_t                                  the network reads what the counts expect ...
    z   = W_head h + sum_k g_k log p_k,   g = W_g h + b     ... and decides how far each of them is to be followed

b begins as 1 for the longest context and 0 else, W_g as 0: an untrained model says what the counts say, and training
adds what they cannot know. A short run so spends nothing on learning spellings by gradient. A memory in which nothing
was counted expects everything alike. The idea of a table beside the network is that of DeepSeek's Engram (2601.07372),
whose tables are learnt; that of learning only what an n-gram model leaves is Li et al. 2022 (2210.14431). Tables grow
with V: this is for characters and small vocabularies.

While training, a block's own counts are left out for its own tokens. The counts are no parameters: they are kept in
the run folder's `ngrams.safetensors`, and are lost in other engines' formats, to which such a model is not exported.

Letters  B rows  T tokens  D model  V vocabulary  K lengths of context
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fathom.errors import CheckpointError
from fathom.knobs import Knobs
from fathom.model.linear import Linear
from fathom.model.ngram.counts import Left, Level, Levels, Recalled, count, nothing, recall
from fathom.model.precision import widen

LARGEST = 1024  # V, up to which a distribution for every place and context is worth its memory
FLOOR = -8.0  # of log p as the network reads it; and what it is about
FILE = "ngrams.safetensors"


class NgramConfig(Knobs):
    """A memory of n-grams beside the network; for vocabularies of at most 1,024."""

    order: int = Field(default=7, ge=2, le=16)
    """K: n of the longest n-grams; contexts have up to n - 1 tokens."""
    blocks: int = Field(default=10, ge=2)
    """Parts of the text whose own counts are left out while they are trained on."""
    tokens: int = Field(default=1 << 24, gt=0)
    """How much of the training text is counted, from its beginning."""


class NgramMemory(nn.Module):
    """tokens -> what the counts expect, for the network to read (`enter`) and to follow (`leave`)."""

    def __init__(self, config: NgramConfig, hidden_size: int, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocabulary, self.lengths = config, vocabulary, config.order
        self.enter_proj = Linear(vocabulary + 2 * config.order, hidden_size)
        self.gate = nn.Linear(hidden_size, config.order)
        self.levels: Levels = ()
        self._own: Levels = ()
        self._block = 1  # tokens of a block

    @property
    def reach(self) -> int:
        """How many tokens before one belong to the longest context that ends with it."""
        return self.lengths - 2

    @torch.no_grad()
    def reset_gate(self) -> None:
        """Follow the longest context alone, whatever the network says."""
        self.gate.weight.zero_()
        self.gate.bias.zero_()[-1] = 1.0

    # --- the counts

    def count(self, text: Tensor) -> None:
        """Count a training text (N) int64, or as much of it as the configuration says."""
        text = text[: self.config.tokens].cpu()
        self._block = max(1, -(-text.numel() // self.config.blocks))
        block = torch.arange(text.numel()) // self._block
        self.levels, self._own = count(text, self.vocabulary, self.lengths, block)
        self._move()

    def save(self, folder: Path) -> None:
        """Write the counts, without those of the blocks."""
        tensors = {f"{k}.{name}": part for k, level in enumerate(self.levels) for name, part in level._asdict().items()}
        draft = folder / f".{FILE}.tmp"
        save_file({name: part.contiguous() for name, part in tensors.items()}, draft)
        draft.replace(folder / FILE)

    def load(self, folder: Path) -> None:
        """Read the counts back. CheckpointError: they are missing, damaged, or of another order."""
        try:
            found = load_file(folder / FILE)
            self.levels = tuple(_level(found, k) for k in range(self.lengths))
            self._move()
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"The counts of model.ngram cannot be read from {folder / FILE}: {error}. The run is not whole; copy "
                "the file from where it was trained."
            ) from None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NgramMemory:
        """Move the counts with the weights, and leave them as exact as they are."""
        super()._apply(fn, recurse)
        self._move()
        return self

    def _move(self) -> None:
        device = self.gate.weight.device
        if device.type != "meta":
            self.levels, self._own = (
                tuple(Level(*(part.to(device) for part in level)) for level in levels)
                for levels in (self.levels, self._own)
            )

    # --- what they say

    def recall(
        self, tokens: Tensor, before: Tensor | None, origins: Tensor | None, segments: Tensor | None
    ) -> Recalled:
        """tokens (B, T); before (B, any): what came before them, -1 for nothing; origins (B): where a row begins in the
        counted text, -1 elsewhere, whose own block is left out; segments (B, T): documents that are kept apart."""
        rows, new = tokens.shape
        skip = 0 if before is None else before.shape[1]
        known = _known(new, rows, segments, tokens.device)
        if before is not None:
            there = (before >= 0).sum(1, keepdim=True)
            known = torch.cat((torch.zeros_like(before), known + there), 1)
            known[:, :skip] = (torch.arange(skip, device=tokens.device) + 1 - (skip - there)).clamp(min=0)
            tokens = torch.cat((before.clamp(min=0), tokens), 1)
        left = None
        if origins is not None and self._own:
            place = origins.unsqueeze(1) + torch.arange(new, device=tokens.device) + 1  # of what is foretold
            block = place // self._block
            left = Left(self._own, torch.where((origins.unsqueeze(1) >= 0) & (block < self.blocks), block, -1))
        if not self.levels:
            return nothing(rows * new, self.vocabulary, self.lengths, tokens.device)
        return recall(self.levels, tokens, self.vocabulary, known, skip, left)

    @property
    def blocks(self) -> int:
        """How many blocks were counted apart."""
        return len(self._own[0].keys) if self._own else 0

    def enter(self, recalled: Recalled, rows: int) -> Tensor:
        """(B, T, D), to be added to the embedding of B rows."""
        likely = recalled.log_p[:, -1].clamp(min=FLOOR) - FLOOR / 2
        features = torch.cat((likely, recalled.trust), 1).to(self.enter_proj.weight.dtype)
        return self.enter_proj(features).unflatten(0, (rows, -1))

    def leave(self, hidden: Tensor, recalled: Recalled) -> Tensor:
        """hidden (B, T, D) after the final norm -> what is added to its logits (B, T, V), float32."""
        gate = widen(self.gate(hidden.to(self.gate.weight.dtype))).flatten(0, 1).unsqueeze(-1)  # (n, K, 1)
        return (gate * recalled.log_p).sum(1).view(*hidden.shape[:2], -1)


def _known(new: int, rows: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """(B, T): how many tokens of its own document end with each."""
    place = torch.arange(1, new + 1, device=device).expand(rows, new)
    if segments is None:
        return place.clone()
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - torch.where(begins, place - 1, 0).cummax(1).values


def _level(found: Mapping[str, Tensor], k: int) -> Level:
    return Level(*(found[f"{k}.{name}"] for name in Level._fields))
