"""The n-gram memory beside counting by hand, and a model that has one."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, batch_of, close, documents, tiny_config, tiny_model, tokens_of
from torch import Tensor

from fathom.batch import Batch
from fathom.errors import CheckpointError, ConfigError
from fathom.generate.cache import caches_for
from fathom.model.cost import Cost
from fathom.model.loss import language_model_loss
from fathom.model.ngram.counts import DISCOUNTS, Left, count, recall
from fathom.model.ngram.memory import FILE, NgramMemory
from fathom.model.quantize import quantize_int8
from fathom.model.transformer import ModelConfig, Transformer

V = 4


def text_of(length: int, seed: int, size: int = V) -> Tensor:
    return torch.randint(size, (length,), generator=torch.Generator().manual_seed(seed))


def by_hand(text: list[int], left_out: set[int], past: list[int], lengths: int) -> list[list[float]]:
    """p_k after `past` for every k, straight from the formula: the slow twin. left_out: places of text that are not
    counted as followers."""
    found, p = [], [1 / V] * V
    places = [i for i in range(len(text)) if i not in left_out]
    for k in range(lengths):
        context = tuple(past[len(past) - k :])
        counts = Counter[int]()
        if len(context) == k <= len(past):
            if k == lengths - 1:
                counts.update(text[i] for i in places if i >= k and tuple(text[i - k : i]) == context)
            else:
                longer = {(text[i - k - 1], text[i]) for i in places if i > k and tuple(text[i - k : i]) == context}
                counts.update(v for _, v in longer)
        total = sum(counts.values())
        discount = {v: DISCOUNTS[min(c, 3) - 1] for v, c in counts.items()}
        share = sum(discount.values()) / total if total else 1.0
        p = [((counts[v] - discount[v]) / total if v in discount else 0.0) + share * p[v] for v in range(V)]
        found.append(p)
    return found


@settings(max_examples=40, deadline=None)
@given(length=st.integers(6, 40), lengths=st.integers(2, 5), blocks=st.integers(1, 3), seed=st.integers(0, 999))
def test_it_says_what_counting_by_hand_says(length: int, lengths: int, blocks: int, seed: int) -> None:
    text = text_of(length, seed)
    block = torch.arange(length) * blocks // length
    whole, own = count(text, V, lengths, block)
    tokens = text_of(7, seed + 1).view(1, 7)
    known = torch.arange(1, 8).view(1, 7)
    said = recall(whole, tokens, V, known, 0, None).log_p.exp()
    which = seed % blocks
    left = Left(own, torch.full((1, 7), which))
    without = recall(whole, tokens, V, known, 0, left).log_p.exp()
    out = {i for i in range(length) if int(block[i]) == which}
    for place in range(7):
        past = tokens[0, : place + 1].tolist()
        for got, skipped in ((said, set[int]()), (without, out)):
            want = torch.tensor(by_hand(text.tolist(), skipped, past, lengths))
            torch.testing.assert_close(got[place], want, rtol=0, atol=1e-5)


def test_what_is_known_ends_with_the_document() -> None:
    text = text_of(60, 0)
    whole, _ = count(text, V, 4)
    tokens = text_of(9, 1).view(1, 9)
    known = torch.tensor([[1, 2, 3, 1, 2, 3, 4, 5, 6]])
    cut = recall(whole, tokens, V, known, 0, None)
    parts = [
        recall(whole, part, V, torch.arange(1, part.shape[1] + 1)[None], 0, None) for part in tokens.split([3, 6], 1)
    ]
    assert torch.equal(cut.log_p, torch.cat([part.log_p for part in parts]))
    assert torch.equal(cut.trust, torch.cat([part.trust for part in parts]))


# --- a model ----------------------------------------------------------------


def remembering(order: int = 4, length: int = 300, **changes: object) -> Transformer:
    model = tiny_model("mla", "v3", 0, ngram={"order": order, "blocks": 3}, **changes)
    assert model.memory is not None
    model.memory.count(text_of(length, 5, VOCABULARY))
    with torch.no_grad():
        model.memory.gate.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("order", [2, 3, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_step_by_step_is_one_pass(order: int, tied: bool) -> None:
    model, tokens = remembering(order, tie_word_embeddings=tied).eval(), tokens_of(2, 9)
    caches = caches_for(model.config, 2, 2, 9, torch.float32, "cpu")
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(part, caches=caches) for part in tokens.split([3, 1, 1, 4], 1)]
        assert close(torch.cat(parts, 1), whole)
        for cache in caches:
            cache.rewind(5)
        assert close(model(tokens[:, 5:], caches=caches), whole[:, 5:])


def test_an_untrained_gate_follows_the_longest_context() -> None:
    model = tiny_model("mla", "v3", 0, ngram={"order": 4})
    assert model.memory is not None
    recalled = model.memory.recall(tokens_of(2, 5), None, None, None)
    assert torch.allclose(model.memory.leave(torch.randn(2, 5, 20), recalled), torch.tensor(-math.log(VOCABULARY)))
    model.memory.count(text_of(300, 5, VOCABULARY))
    recalled = model.memory.recall(tokens_of(2, 5), None, None, None)
    assert torch.equal(model.memory.leave(torch.randn(2, 5, 20), recalled).flatten(0, 1), recalled.log_p[:, -1])


def test_documents_and_padding_do_not_touch_each_other() -> None:
    model = remembering().eval()
    batch = documents([[4, 5], [7]], padded_to=10)
    with torch.no_grad():
        together = model(batch.tokens, batch.positions, batch.segments)
        for row, start, stop in ((0, 0, 4), (0, 4, 9), (1, 0, 7)):
            assert close(together[row : row + 1, start:stop], model(batch.tokens[row : row + 1, start:stop]))


def test_the_loss_is_that_of_the_logits_and_its_gradients_reach_everything() -> None:
    model, batch = remembering(), batch_of()
    losses = language_model_loss(model, batch)
    logits = model(batch.tokens)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    assert close(losses.next_token, want)
    losses.total.backward()
    gradients = dict(model.named_parameters())
    by_loss = {name: weight.grad.clone() for name, weight in gradients.items() if weight.grad is not None}
    assert set(gradients) - set(by_loss) == set()
    model.zero_grad()
    (want / batch.target_count + sum(r.loss for r in model.trunk(batch.tokens).routing)).backward()
    for name, weight in gradients.items():
        assert weight.grad is not None
        assert close(by_loss[name], weight.grad, 1e-4), name


def test_a_block_is_left_out_for_its_own_tokens() -> None:
    model = remembering(length=90)
    text = text_of(90, 5, VOCABULARY)
    rows = torch.stack([text[0:10], text[30:40]])
    batch = Batch(rows[:, :-1], rows[:, 1:], torch.arange(9).expand(2, 9), origins=torch.tensor([0, 30]))
    assert model.memory is not None
    trusting = model.memory.recall(batch.tokens, None, None, None)
    careful = model.memory.recall(batch.tokens, None, batch.origins, None)
    place = torch.arange(18), batch.targets.flatten()
    assert (trusting.log_p[:, -1][place] > careful.log_p[:, -1][place] + 0.1).all()
    elsewhere = model.memory.recall(batch.tokens, None, torch.tensor([-1, 900]), None)
    assert torch.equal(elsewhere.log_p, trusting.log_p)
    assert (
        language_model_loss(model, batch).next_token > language_model_loss(model, Batch(*batch_parts(batch))).next_token
    )


def batch_parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.tokens, batch.targets, batch.positions


def test_counts_are_saved_and_read_back(tmp_path: Path) -> None:
    model = remembering().eval()
    assert model.memory is not None
    model.memory.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    other = NgramMemory(model.memory.config, 20, VOCABULARY)
    other.load(tmp_path)
    for a, b in zip(model.memory.levels, other.levels, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert other.blocks == 0
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"cannot be read .* not whole"):
        other.load(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match=FILE):
        other.load(tmp_path)


def test_weights_are_counted_and_cast() -> None:
    model = remembering()
    assert sum(weight.numel() for weight in model.parameters()) == Cost(model.config).parameters()
    narrow = model.bfloat16().eval()
    assert narrow.memory is not None
    assert narrow.memory.levels[0].times.dtype == torch.float32
    with torch.no_grad():
        assert narrow(tokens_of(1, 5)).isfinite().all()


def test_int8_keeps_what_is_remembered() -> None:
    model, tokens = remembering().eval(), tokens_of(2, 7)
    with torch.no_grad():
        want = model(tokens)
        assert close(quantize_int8(model)(tokens), want, 0.05)


def test_impossible_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MTP depths have no n-gram memory"):
        tiny_config("mla", "v3", 1, ngram={"order": 3})
    with pytest.raises(ConfigError, match=r"at most 1,024 tokens, and there are 1,025"):
        tiny_config("mla", "v3", 0, ngram={}, vocab_size=1025)
    unsized = tiny_config("mla", "v3", 0, ngram={}, vocab_size=None)
    with pytest.raises(ConfigError, match="character"):
        Transformer(unsized.model_copy(update={"vocab_size": 2000}))
    assert ModelConfig.model_validate({"ngram": None}).ngram is None
