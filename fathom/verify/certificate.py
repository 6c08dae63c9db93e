"""The certificate of a checkpoint: what must hold of any model of ours, measured on this one.

Each check computes the same thing twice, by the model's own path and by a slower or more literal one, and gives the
largest difference with what is allowed. It takes the model as it is: weights, biases and sizes are those that were
trained. float32 is meant; narrower arithmetic differs by more than is allowed here.

Letters  n tokens  E experts  K chosen
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fathom.generate.cache import Cache, caches_for
from fathom.generate.generator import Generator
from fathom.generate.request import Request, SamplingParams
from fathom.generate.speculative import SpeculativeGenerator
from fathom.model.attention.mla import MLA
from fathom.model.cost import Cost
from fathom.model.moe.balance import RoutingReport
from fathom.model.moe.layer import MoE
from fathom.model.moe.router import Choice, Router
from fathom.model.transformer import Transformer
from fathom.runtime.seed import generator as chance
from fathom.tokenizer.tokenizer import Tokenizer

LENGTH = 48  # tokens that are looked at
RELATIVE = 1e-4  # of the largest number, for sums of float32 in another order


@dataclass(frozen=True)
class Check:
    """name: what must hold; error: the largest difference that was measured, of at most `allowed`; said: on what."""

    name: str
    error: float
    allowed: float
    said: str

    @property
    def passed(self) -> bool:
        """Not a number has not passed."""
        return self.error <= self.allowed

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        error = self.error if math.isfinite(self.error) else None
        return {**asdict(self), "error": error, "passed": self.passed}


@torch.no_grad()
def certify(model: Transformer, tokenizer: Tokenizer) -> list[Check]:
    """Every check that applies to a model in eval mode: routing where it has experts, the two paths of MLA, caches, the
    reference loop, MTP's losslessness, and the cost formulas."""
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    size = min(model.embed_tokens.num_embeddings, tokenizer.vocab_size)
    length = min(LENGTH, model.config.max_position_embeddings)
    tokens = torch.randint(size, (1, length), generator=chance(0, "certificate"))
    tokens = tokens.to(model.embed_tokens.weight.device)
    seen = Seen.of(model, tokens)
    checks = [check(model, tokens, seen) for check in (routing, affinities, gates, absorption, stepping)]
    told = [reference(model, tokenizer, tokens), lossless(model, tokenizer, tokens)]
    counted = [parameters(model), cache_bytes(model, tokens)]
    return [check for check in (*checks, *told, *counted) if check is not None]


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number that is wanted."""
    if not found.isfinite().all():
        return math.nan
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))


# --- what the parts were given ------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What went through routers and latent attention in one pass over all layers, MTP depths included.

    routers: each with the tokens (n, D) that it was given and what its layer says it did, (n, ...) a part
    """

    routers: list[tuple[Router, Tensor, RoutingReport]]
    attentions: list[tuple[MLA, tuple[Any, ...]]]
    logits: Tensor

    @classmethod
    def of(cls, model: Transformer, tokens: Tensor) -> Seen:
        """Run the model over tokens (1, n)."""
        routers: list[tuple[Router, Tensor, RoutingReport]] = []
        attentions: list[tuple[MLA, tuple[Any, ...]]] = []

        def listen(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(module, MoE):
                did = output[1]
                flat = {name: getattr(did, name).flatten(0, 1) for name in ("experts", "weights", "scores")}
                routers.append((module.gate, given[0].flatten(0, 1), did._replace(**flat)))
            elif isinstance(module, MLA):
                attentions.append((module, given[:3]))

        with ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, MoE | MLA):
                    stack.callback(module.register_forward_hook(listen).remove)
            hidden = model.trunk(tokens).hidden
            logits = model.logits(hidden)
            for depth in range(1, len(model.mtp) + 1):
                if hidden.shape[1] < 2:
                    break
                places = torch.arange(hidden.shape[1] - 1, device=tokens.device).unsqueeze(0)
                hidden, _ = model.look_ahead(depth, hidden[:, :-1], tokens[:, depth:], places, None)
        return cls(routers, attentions, logits)


# --- routing ------------------------------------------------------------


def routing(model: Transformer, tokens: Tensor, seen: Seen) -> Check | None:
    """The K largest s + b within the best groups, found by sorting in plain Python."""
    worst, count = 0.0, 0
    for router, _, choice in seen.routers:
        biased = choice.scores + router.e_score_correction_bias
        for row, experts in zip(biased.tolist(), choice.experts.tolist(), strict=True):
            found = sorted((row[e] for e in experts), reverse=True)
            wanted = sorted(by_sorting(row, router), reverse=True)
            repeated = len(set(experts)) < len(experts)
            worst = max(
                [worst, math.inf if repeated else 0.0, *(abs(f - w) for f, w in zip(found, wanted, strict=True))]
            )
            count += 1
    if not count:
        return None
    first = seen.routers[0][0]
    groups = f", {first.topk_group} of {first.n_group} groups" if first.n_group > 1 else ""
    return Check("the best s + b are chosen", worst, 0.0, f"{first.k} experts{groups}; {count} choices")


def by_sorting(row: list[float], router: Router) -> list[float]:
    """The s + b of the experts that the rules choose; row: s + b of all E."""
    width = len(row) // router.n_group
    groups = [row[start : start + width] for start in range(0, len(row), width)]
    if router.n_group > 1:
        best = 1 if router.group_score == "max" else 2
        value = torch.tensor([sum_of(sorted(group, reverse=True)[:best]) for group in groups]).tolist()
        kept = sorted(range(len(groups)), key=lambda i: -value[i])[: router.topk_group]
        groups = [groups[i] for i in kept]
    return sorted((v for group in groups for v in group), reverse=True)[: router.k]


def sum_of(values: list[float]) -> float:
    """A sum in float32, as the router adds."""
    return float(torch.tensor(values, dtype=torch.float32).sum())


def affinities(model: Transformer, tokens: Tensor, seen: Seen) -> Check | None:
    """s = softmax(W x) or sigmoid(W x), again in float64."""
    if not seen.routers:
        return None
    worst = 0.0
    for router, x, choice in seen.routers:
        logits = x.double() @ router.weight.double().T
        exact = logits.softmax(-1) if router.scoring_func == "softmax" else logits.sigmoid()
        worst = max(worst, float((choice.scores - exact).abs().max()))
    return Check(f"s is {seen.routers[0][0].scoring_func}(W x)", worst, 1e-4, f"{len(seen.routers)} layers")


def gates(model: Transformer, tokens: Tensor, seen: Seen) -> Check | None:
    """The weights are made of s alone, under the bias that was trained and under one that turns the choice over."""
    if not seen.routers:
        return None
    worst, moved, total = 0.0, 0, 0
    for router, x, choice in seen.routers:
        own = router.e_score_correction_bias
        worst = max(worst, _weight_error(router, choice))
        try:
            router.e_score_correction_bias = torch.rand(own.shape, generator=chance(0, "bias")).to(own)
            other = router(x)
        finally:
            router.e_score_correction_bias = own
        worst = max(worst, _weight_error(router, other))
        moved += int((other.experts.sort(-1).values != choice.experts.sort(-1).values).sum())
        total += other.experts.numel()
    said = f"{moved / total:.0%} of the choices moved by another bias"
    return Check("the bias is in no gate value", worst, 1e-5, said)


def _weight_error(router: Router, choice: Choice | RoutingReport) -> float:
    weights = choice.scores.double().gather(-1, choice.experts)
    if router.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return relative(choice.weights.double(), weights * router.scale)


# --- attention and caches ------------------------------------------------------------


def absorption(model: Transformer, tokens: Tensor, seen: Seen) -> Check | None:
    """MLA's two paths, layer by layer, on what each layer was given."""
    if not seen.attentions:
        return None
    worst = max(
        relative(layer(*given, absorbed=True), layer(*given, absorbed=False)) for layer, given in seen.attentions
    )
    return Check("absorbed = expanded attention", worst, RELATIVE, f"{len(seen.attentions)} layers")


def stepping(model: Transformer, tokens: Tensor, seen: Seen) -> Check:
    """A token at a time with caches, and all at once."""
    caches = caches_for(model.config, len(model.layers), 1, tokens.shape[1], torch.float32, tokens.device)
    steps = [model(token, caches=caches) for token in tokens.split(1, dim=1)]
    worst = relative(torch.cat(steps, 1), seen.logits)
    return Check("step by step = one pass", worst, RELATIVE, f"{tokens.shape[1]} tokens")


# --- generation ------------------------------------------------------------


def greedy_request(model: Transformer, tokens: Tensor) -> Request:
    """The first third of tokens (1, n) to be continued, past any end of text, to n in all."""
    prompt = tokens[0, : max(1, tokens.shape[1] // 3)].tolist()
    room = max(1, tokens.shape[1] - len(prompt))
    return Request(tuple(prompt), SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True))


def differing(found: list[int], wanted: list[int]) -> int:
    """How many tokens do not agree, missing ones too."""
    return sum(a != b for a, b in zip(found, wanted, strict=False)) + abs(len(found) - len(wanted))


def reference(model: Transformer, tokenizer: Tokenizer, tokens: Tensor) -> Check | None:
    """The generator's greedy tokens, and those of reading the whole text again for every token."""
    if tokens.shape[1] < 2:
        return None
    request = greedy_request(model, tokens)
    found = Generator(model, tokenizer).complete(request).token_ids
    text = list(request.prompt_ids)
    for _ in range(len(found)):
        row = torch.tensor([text], device=tokens.device)
        text.append(int(model(row)[0, -1].argmax()))
    wrong = differing(found, text[len(request.prompt_ids) :])
    return Check("greedy with caches = without", wrong, 0, f"{len(found)} greedy tokens")


def lossless(model: Transformer, tokenizer: Tokenizer, tokens: Tensor) -> Check | None:
    """Greedy tokens with and without MTP's drafts."""
    if not len(model.mtp) or tokens.shape[1] < 2:
        return None
    request = greedy_request(model, tokens)
    plain = Generator(model, tokenizer).complete(request)
    drafted = SpeculativeGenerator(model, tokenizer).complete(request)
    wrong = differing(drafted.token_ids, plain.token_ids)
    said = f"{len(plain.tokens)} greedy tokens; {drafted.accepted} of {drafted.drafted} drafts accepted"
    return Check("greedy with MTP drafts = without", wrong, 0, said)


# --- cost ------------------------------------------------------------


def parameters(model: Transformer) -> Check:
    """The formulas, and the tensors that are there."""
    cost = Cost(model.config)
    counted = {True: 0, False: 0}
    for name, weight in model.named_parameters():
        counted[name.startswith("mtp.")] += weight.numel()
    wrong = abs(counted[False] - cost.parameters()) + abs(counted[True] - cost.mtp_parameters())
    extra = f" and {counted[True]:,} of MTP" if counted[True] else ""
    return Check("parameters are as counted", wrong, 0, f"{counted[False]:,}{extra}")


class Counting(Cache):
    """A cache that counts the numbers it is given."""

    numbers = 0

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store new tensors (1, T, width)."""
        self.numbers += sum(part.numel() for part in new)
        return super().append(*new)


def cache_bytes(model: Transformer, tokens: Tensor) -> Check:
    """The formula, and what all layers hand to their caches."""
    widths, weight, (rows, length) = model.config.cache_widths, model.embed_tokens.weight, tokens.shape
    caches = [Counting(widths, rows, length, weight.dtype, weight.device) for _ in model.layers]
    model.trunk(tokens, caches=caches)
    numbers = sum(cache.numbers for cache in caches)
    wanted = Cost(model.config).cache_bytes_per_token(2)
    wrong = abs(2 * numbers - wanted * tokens.shape[1])
    return Check("cache bytes are as counted", wrong, 0, f"{wanted:,} bytes a token in 16 bits")
