from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_models import MOES, VOCABULARY, batch_of, documents, tiny_model

from fathom.batch import IGNORE, Batch
from fathom.errors import DataError
from fathom.evaluate.loss import measure
from fathom.evaluate.text import text_batches
from fathom.model.loss import language_model_loss
from fathom.model.moe.balance import max_vio
from fathom.runtime.world import World
from fathom.train.callbacks import Evaluated

BYTES = [b"ab", b" c", b"", *[b"x"] * (VOCABULARY - 3)]


@pytest.mark.parametrize("moe", list(MOES))
def test_it_is_the_training_loss_of_the_same_rows(moe: str) -> None:
    model = tiny_model(moe=moe, depths=2).eval()
    batches = [batch_of(seed=1), documents([[5, 4], [9]], padded_to=11), batch_of(rows=1, length=2)]
    got = measure(model, batches)
    with torch.no_grad():
        losses = [language_model_loss(model, b) for b in batches]
    assert got.tokens == sum(int(x.tokens) for x in losses)
    assert got.loss == pytest.approx(sum(float(x.next_token) for x in losses) / got.tokens, rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(got.loss))
    for depth in range(2):
        tokens = sum(int(x.mtp_tokens[depth]) for x in losses if len(x.mtp) > depth)
        nats = sum(float(x.mtp[depth]) for x in losses if len(x.mtp) > depth)
        assert got.mtp[depth].tokens == tokens
        assert got.mtp[depth].loss == pytest.approx(nats / tokens, rel=1e-6)
    assert got.mtp_loss == pytest.approx(sum(d.loss for d in got.mtp) / 2)
    for layer in got.routing:
        counts = sum(next(r.counts for r in x.routing if r.layer == layer.layer) for x in losses if len(x.mtp) == 2)
        rest = [r.counts for r in losses[2].routing if r.layer == layer.layer]
        total = torch.as_tensor(counts) + (rest[0] if rest else 0)
        assert list(layer.counts) == total.tolist()
        assert layer.max_vio == pytest.approx(max_vio(total))
        assert layer.dead == int((total == 0).sum())
        assert 0 < layer.entropy <= math.log(6) + 1e-6
    assert [x.layer for x in got.routing] == ([] if moe == "dense" else [1, 2, 3])
    assert (got.max_vio is None) == (moe == "dense")


def test_bits_per_byte_and_word_perplexity_by_hand() -> None:
    model = tiny_model(depths=0).eval()
    tokens, targets = torch.tensor([[2, 0, 1, 3]]), torch.tensor([[0, 1, 2, 5]])
    batch = Batch(tokens, targets, torch.arange(4)[None])
    got = measure(model, [batch], BYTES)
    # "ab" after a special token, " c", the end of text, "x" after "x": 2 + 2 + 0 + 1 bytes, and "ab", "c" begin words
    assert (got.bytes, got.words, got.tokens) == (5, 2, 4)
    with torch.no_grad():
        nats = -model(tokens)[0].double().log_softmax(-1)[range(4), targets[0]].sum()
    assert got.nats == pytest.approx(float(nats), rel=1e-6)
    assert got.bits_per_byte == pytest.approx(float(nats) / 5 / math.log(2), rel=1e-6)
    assert got.word_perplexity == pytest.approx(math.exp(float(nats) / 2), rel=1e-5)
    bare = measure(model, [batch])
    assert (bare.bytes, bare.bits_per_byte, bare.word_perplexity, bare.mtp_loss) == (None, None, None, None)
    assert bare.loss == got.loss


def test_acceptance_is_what_greedy_speculation_would_accept() -> None:
    model, batch = tiny_model(depths=2).eval(), batch_of(rows=2, length=9)
    got = measure(model, [batch])
    for depth in (1, 2):
        right = 0
        for row in range(2):
            tokens = batch.tokens[row : row + 1]
            for end in range(1, 9 - depth + 1):  # the hidden state of token end - 1, and `depth` true tokens after it
                with torch.no_grad():
                    hidden = model.trunk(tokens[:, : end + depth]).hidden
                    main = int(model.logits(hidden[0, -1]).argmax())
                    for k in range(1, depth + 1):
                        length = end + depth - k
                        hidden, _ = model.look_ahead(
                            k, hidden[:, :length], tokens[:, k : length + k], torch.arange(length)[None], None
                        )
                    right += int(model.logits(hidden[0, -1]).argmax()) == main
        assert got.mtp[depth - 1].acceptance == pytest.approx(right / got.mtp[depth - 1].tokens)
    assert got.mtp_acceptance == got.mtp[0].acceptance


def test_a_perfect_drafter_is_always_accepted() -> None:
    model = tiny_model(depths=1, moe="dense").eval()
    with torch.no_grad():
        model.head_weight.zero_()  # all tokens are equally likely, so the first is the likeliest everywhere
    assert measure(model, [batch_of()]).mtp_acceptance == 1.0


def test_it_changes_nothing_and_needs_eval_mode() -> None:
    model = tiny_model().eval()
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    measure(model, [batch_of()])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert all(w.grad is None for w in model.parameters())
    with pytest.raises(ValueError, match="training mode"):
        measure(model.train(), [batch_of()])


def test_weights_in_bfloat16_are_measured() -> None:
    plain, narrow = tiny_model(depths=1).eval(), tiny_model(depths=1).eval().bfloat16()
    wanted, found = (measure(model, [batch_of()]) for model in (plain, narrow))
    assert found.loss == pytest.approx(wanted.loss, rel=0.01)
    assert found.loss != wanted.loss


def test_nothing_to_measure_is_refused() -> None:
    batch = batch_of()
    batch.targets.fill_(IGNORE)
    for batches in ([], [batch]):
        with pytest.raises(DataError, match="no text to measure"):
            measure(tiny_model().eval(), batches)


class TwoRanks(World):
    """Adds what another rank had, as a collective would."""

    def __init__(self, other: list[float]) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "other", other)

    def sums(self, values, device):  # type: ignore[no-untyped-def]
        return [a + b for a, b in zip(values, self.other, strict=True)]  # type: ignore[attr-defined]


class Listening(World):
    def sums(self, values, device):  # type: ignore[no-untyped-def]
        self.__dict__["said"] = list(values)
        return super().sums(values, device)


def test_ranks_add_up_even_if_one_has_nothing() -> None:
    model = tiny_model(depths=2).eval()
    a, b = batch_of(seed=1), batch_of(rows=2, seed=2)
    alone = measure(model, [a, b], BYTES)
    for mine, theirs in (([a], [b]), ([], [a, b])):
        other = Listening()
        measure(model, theirs, BYTES, world=other)
        together = measure(model, mine, BYTES, world=TwoRanks(other.__dict__["said"]))
        assert together.tokens == alone.tokens
        assert together.loss == pytest.approx(alone.loss, rel=1e-12)
        assert together.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-12)
        assert [x.counts for x in together.routing] == [x.counts for x in alone.routing]
        assert [d.acceptance for d in together.mtp] == [d.acceptance for d in alone.mtp]


def test_it_is_what_the_trainer_asks_for() -> None:
    evaluated: Evaluated = measure(tiny_model().eval(), text_batches([1, 2, 3], 0, 5, 1), BYTES)
    assert evaluated.loss > 0
    assert evaluated.bits_per_byte is not None


def test_huge_losses_have_a_perplexity() -> None:
    model = tiny_model(depths=0).eval()
    with torch.no_grad():
        model.head_weight.mul_(1e5)
    assert measure(model, [batch_of()], BYTES).perplexity == math.inf


def test_without_mtp_the_rest_is_the_same() -> None:
    model = tiny_model(depths=2).eval()
    whole, short = measure(model, [batch_of()]), measure(model, [batch_of()], ahead=False)
    assert (short.nats, short.tokens, short.mtp, short.mtp_loss) == (whole.nats, whole.tokens, (), None)
    trunk = [layer for layer in whole.routing if layer.layer < model.config.num_hidden_layers]
    assert list(short.routing) == trunk
    assert len(trunk) < len(whole.routing)
