from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, batch_of, documents, tiny_config, tiny_model

from fathom.batch import IGNORE, Batch
from fathom.model.loss import language_model_loss, mtp_targets
from fathom.model.mtp import MTPConfig


def mtp_by_hand(model, batch: Batch) -> list[float]:  # type: ignore[no-untyped-def]
    """Depth by depth as in the equations, a row at a time, with all logits; one document a row."""
    sums = []
    for depth in range(1, len(model.mtp) + 1):
        total = 0.0
        for row in range(len(batch)):
            tokens, length = batch.tokens[row], batch.tokens.shape[1]
            hidden = model.trunk(tokens[None]).hidden
            for k in range(1, depth + 1):
                keep = length - k
                h, layer = hidden[:, :keep], model.mtp[k - 1]
                joined = torch.cat((layer.enorm(model.embed_tokens(tokens[None, k:])), layer.hnorm(h)), -1)
                merged = joined @ layer.eh_proj.weight.T
                positions = torch.arange(keep)[None]
                out, _ = layer.block(merged, model.rope(positions), visible_row(keep))
                hidden = layer.shared_head.norm(out)
            logits = hidden[0] @ model.head_weight.T
            total += float(F.cross_entropy(logits, batch.targets[row, depth:], ignore_index=IGNORE, reduction="sum"))
        sums.append(total)
    return sums


def visible_row(length: int):  # type: ignore[no-untyped-def]
    from fathom.model.attention.cache import Visibility

    return Visibility.of(length, length, None, torch.device("cpu"))


@pytest.mark.parametrize("moe", ["dense", "v3"])
@pytest.mark.parametrize("depths", [1, 2, 3])
def test_loss_is_the_equations(moe: str, depths: int) -> None:
    model, batch = tiny_model(moe=moe, depths=depths), batch_of()
    with torch.no_grad():
        assert language_model_loss(model, batch).mtp.tolist() == pytest.approx(mtp_by_hand(model, batch), rel=1e-5)


def test_targets_stay_in_their_document() -> None:
    batch = documents([[5, 4], [9, 2]], padded_to=11)
    assert batch.segments is not None
    for depth in (1, 2, 3):
        targets = mtp_targets(batch, depth)
        assert targets.shape == (2, 11 - depth)
        assert int((targets != IGNORE).sum()) == sum(max(0, n - 1 - depth) for n in (5, 4, 9, 2))
        for row, i in (targets != IGNORE).nonzero().tolist():
            assert targets[row, i] == batch.tokens[row, i + depth + 1]
            assert batch.segments[row, i] == batch.segments[row, i + depth + 1]


def test_documents_in_a_row_are_as_alone() -> None:
    model = tiny_model(depths=2).eval()
    batch = documents([[7, 4]], padded_to=11)
    alone = [Batch(batch.tokens[:, s], batch.targets[:, s], batch.positions[:, s]) for s in (slice(0, 7), slice(7, 11))]
    with torch.no_grad():
        together = language_model_loss(model, batch).mtp
        apart = sum(language_model_loss(model, b).mtp for b in alone)
    torch.testing.assert_close(together, apart)


def test_a_depth_sees_the_token_ahead_and_none_beyond() -> None:
    model = tiny_model(depths=1, moe="dense").eval()
    tokens = batch_of(1).tokens

    def hidden(t: torch.Tensor) -> torch.Tensor:
        before = model.trunk(t).hidden
        return model.look_ahead(1, before[:, :-1], t[:, 1:], torch.arange(10)[None], None)[0]

    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % VOCABULARY
    a, b = hidden(tokens), hidden(changed)
    assert torch.equal(a[:, :5], b[:, :5])
    assert (a[:, 5] != b[:, 5]).any()


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_shared(tied: bool) -> None:
    model = tiny_model(depths=2, tie_word_embeddings=tied)
    names = [name for name, _ in model.named_parameters() if name.startswith("mtp.")]
    assert not any("embed" in name or "head.weight" in name for name in names)
    batch = batch_of()
    grads = []
    for weight in (0.0, 0.5):
        model.zero_grad()
        language_model_loss(model, batch, mtp_weight=weight).total.backward()
        grads.append((model.embed_tokens.weight.grad.clone(), model.head_weight.grad.clone()))  # type: ignore[union-attr]
    assert all((a != b).any() for a, b in zip(*grads, strict=True))


def test_rows_shorter_than_the_depth_are_possible() -> None:
    losses = language_model_loss(tiny_model(depths=3), batch_of(length=2))
    assert losses.mtp.shape == (1,)
    assert losses.total.isfinite()


def test_weight_falls_once() -> None:
    mtp = MTPConfig(weight=0.3, final_weight=0.1, final_from=0.5)
    assert [mtp.weight_at(p) for p in (0.0, 0.49, 0.5, 1.0)] == [0.3, 0.3, 0.1, 0.1]


def test_depths_are_moe_if_the_model_is() -> None:
    config = tiny_config(moe="v3", depths=2)
    assert [config.moe_of(i) is not None for i in range(4)] == [False, True, True, True]
    assert tiny_config(moe="dense").moe_of(2) is None
