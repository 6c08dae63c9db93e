"""Logits -> the next token. Pure: the same logits and the same `Turn` give the same token, in any batch.

    z   = logits + logit_bias                    -inf for what ends the answer, before min_tokens
    z   = z / r if z > 0 else z r                tokens of prompt and output; r = repetition_penalty
    z   = z - f count - p [count > 0]            tokens of the output; frequency and presence penalty
    greedy: argmax z.   Else  w = softmax(z / temperature) over what is left by, in this order,
    top_k   z at least as large as the k-th largest
    top_p   the fewest likeliest whose probabilities, after top_k, add up to p or more
    min_p   w at least min_p times the largest
    token = the first t with  w_0 + ... + w_t > u sum(w),   u uniform in [0, 1)

The order is that of Hugging Face. Ties stay together: a cut never parts tokens that are equally likely, so the result
does not depend on how a device sorts. Weights are float64, and u comes from a generator of its own for each (seed,
place in the answer): neither neighbours in a batch nor earlier tokens touch it.

`choose` works on one row and is the slow twin of `choose_batch`.

Letters  B rows  V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.generate.request import SamplingParams
from fathom.runtime import seed as chance


class Turn(NamedTuple):
    """What sampling needs to know of a request: prompt and output are the tokens so far, ends the tokens that would end
    the answer, seed that of the request."""

    params: SamplingParams
    seed: int
    prompt: Sequence[int]
    output: Sequence[int]
    ends: frozenset[int]


class Choice(NamedTuple):
    """A token; its logprob and those of the likeliest, as `TokenOutput` has them."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def adjust(logits: Tensor, turn: Turn) -> Tensor:
    """logits (V) -> z (V) float32: bias, barred ends and penalties; float32 logits themselves where there are none."""
    params, z = turn.params, logits.float()
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=z.device)
        z = z.index_add(0, ids, torch.tensor(list(params.logit_bias.values()), dtype=z.dtype, device=z.device))
    if len(turn.output) < params.min_tokens and turn.ends:
        z = z.index_fill(0, torch.tensor(sorted(turn.ends), device=z.device), -math.inf)
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*turn.prompt, *turn.output}), device=z.device)
        old = z[seen]
        z = z.index_copy(
            0, seen, torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        )
    if turn.output and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(torch.tensor(turn.output, device=z.device), minlength=z.shape[0])
        z = z - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return z


def distribution(z: Tensor, params: SamplingParams) -> Tensor:
    """z (V) -> weights w (V) float64, not normalised; for a temperature above 0."""
    z = z.double() / params.temperature
    if params.top_k is not None and params.top_k < z.shape[0]:
        z = z.masked_fill(z < z.topk(params.top_k).values[-1], -math.inf)
    w = z.softmax(-1)
    if params.top_p < 1:
        ordered = w[w > 0].sort(descending=True).values
        if len(ordered):  # of NaN there is none
            before = ordered.cumsum(-1) - ordered
            w = w.masked_fill(w < ordered[before < params.top_p].min(), 0)
    return w.masked_fill(w < params.min_p * w.max(), 0)


def uniform(seed: int, what: str, place: int) -> float:
    """A float64 in [0, 1) that belongs to (seed, what, place) alone."""
    own = chance.generator(seed, what, place)
    return torch.rand((), dtype=torch.float64, generator=own).item()


def draw(weights: Tensor, u: float) -> int:
    """The token that u in [0, 1) falls on; weights (V) float64. The last one where weights are NaN: a token in any
    case."""
    sums = weights.cumsum(-1)
    return min(int(torch.searchsorted(sums, u * sums[-1:], right=True)), len(sums) - 1)


def tell(logits: Tensor, token: int, params: SamplingParams) -> Choice:
    """A chosen token with the log-probabilities that were asked for; logits (V) as the model gave them."""
    if params.logprobs is None:
        return Choice(token)
    known = logits.float().log_softmax(-1)
    values, ids = known.topk(min(params.logprobs, known.shape[0]))
    return Choice(token, known[token].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def largest(z: Tensor) -> list[int]:
    """Where each row of z (B, V) is largest; on a CPU by NumPy, which takes a tenth of PyTorch's time."""
    found: list[int] = (z.detach().numpy() if z.device.type == "cpu" else z).argmax(-1).tolist()
    return found


def choose(logits: Tensor, turn: Turn) -> Choice:
    """The next token of one request; logits (V)."""
    z = adjust(logits, turn)
    if turn.params.greedy:
        (token,) = largest(z.unsqueeze(0))
    else:
        token = draw(distribution(z, turn.params), uniform(turn.seed, "sampling", len(turn.output)))
    return tell(logits, token, turn.params)


def distributions(z: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`distribution` of many rows at once: z (B, V) -> w (B, V)."""
    vocabulary = z.shape[-1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=z.device).unsqueeze(-1)

    z = z.double() / column([p.temperature for p in params])
    ks = [min(p.top_k or vocabulary, vocabulary) for p in params]
    cut = [k for k in ks if k < vocabulary]
    if cut:
        largest = z.topk(max(cut)).values
        at = torch.tensor([min(k, max(cut)) - 1 for k in ks], device=z.device).unsqueeze(-1)
        limited = torch.tensor([k < vocabulary for k in ks], device=z.device).unsqueeze(-1)
        z = z.masked_fill(limited & (z < largest.gather(-1, at)), -math.inf)
    w = z.softmax(-1)
    if any(p.top_p < 1 for p in params):
        top_p = column([p.top_p for p in params])
        ordered = _likeliest(w, top_p)
        before = ordered.cumsum(-1) - ordered
        least = ordered.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        w = w.masked_fill((top_p < 1) & (w < least), 0)
    return w.masked_fill(w < column([p.min_p for p in params]) * w.amax(-1, keepdim=True), 0)


def _likeliest(w: Tensor, top_p: Tensor) -> Tensor:
    """The largest of w (B, V), in order, as many as it takes for every row to make up its top_p (B, 1), where that is
    below 1: mostly few, so that a whole vocabulary need not be sorted."""
    k = min(64, w.shape[-1])
    while True:
        ordered = w.topk(k).values
        enough = (ordered.sum(-1, keepdim=True) >= top_p) | (top_p >= 1)
        if k == w.shape[-1] or bool(enough.all()):
            return ordered
        k = min(8 * k, w.shape[-1])


def choose_batch(logits: Tensor, turns: Sequence[Turn]) -> list[Choice]:
    """The next token of each request; logits (B, V). Equal to `choose` of every row."""
    z = logits.float()
    changed = {}
    for i, (row, turn) in enumerate(zip(z, turns, strict=True)):
        if (adjusted := adjust(row, turn)) is not row:
            changed[i] = adjusted
    if changed:
        z = z.index_copy(0, torch.tensor(list(changed), device=z.device), torch.stack(list(changed.values())))
    tokens = largest(z)
    drawn = [i for i, turn in enumerate(turns) if not turn.params.greedy]
    if drawn:
        w = distributions(z[drawn], [turns[i].params for i in drawn])
        u = [uniform(turns[i].seed, "sampling", len(turns[i].output)) for i in drawn]
        sums = w.cumsum(-1)
        aims = torch.tensor(u, dtype=torch.float64, device=z.device).unsqueeze(-1) * sums[:, -1:]
        fell = torch.searchsorted(sums, aims, right=True).clamp_(max=sums.shape[-1] - 1)
        for i, token in zip(drawn, fell.squeeze(-1).tolist(), strict=True):
            tokens[i] = token
    return [tell(row, token, turn.params) for row, token, turn in zip(logits, tokens, turns, strict=True)]
