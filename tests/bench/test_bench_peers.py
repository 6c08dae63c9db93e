"""Contestants in this process: at equal weights they have the same loss, step by step, and say the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.bench.decode import letter_of
from fathom.bench.material import Material
from fathom.bench.peers import ours_decoding, ours_feeding, ours_training

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
# without what peers have not: MTP, and a balance loss
PLAIN = ["model.mtp.num_nextn_predict_layers=0", "model.moe.balance.sequence_loss=0", "model.moe.balance.rate=0"]
BOTH = {"rows": 2, "micro_batches": 2, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material.of(TINY, PLAIN, tmp_path_factory.mktemp("scratch"))


def training(material: Material, **more: Any) -> dict[str, Any]:
    tokens = str(material.rows(16, 8))
    optimizer = {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
    return {**BOTH, **optimizer, "tokens": tokens, "precision": "float32", **more}


def test_training_is_the_same_training(material: Material) -> None:
    peer = pytest.importorskip("fathom.bench.peers.in_transformers")
    config = str(material.recipe("float32", 2, 2, 1, "cpu"))
    ours = ours_training.Trainer(training(material, config=config, source=None))
    theirs = peer.Trainer(training(material, model=str(material.folder())))
    chosen = theirs.choose()
    assert set(theirs.setting) == {"precision", "attention", "experts"}
    assert min(chosen["tried"].values()) > 0
    for _ in range(5):  # the rows begin again within
        mine, other = ours.step(), theirs.step()
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-3)
        assert sum(mine["parts"].values()) == pytest.approx(mine["seconds"])
        assert sum(other["parts"].values()) == pytest.approx(other["seconds"])
        assert min(mine["parts"].values()) > 0
    assert ours.state_bytes() == theirs.state_bytes() == 16 * material.cost.parameters()
    assert mine["loss"] < 5.4  # both have learned, and not only agree
    assert ours.peak_on_device() == theirs.peak_on_device() == 0


def decoding(material: Material, **more: Any) -> dict[str, Any]:
    shared = {"model": material.place(), "weights": "float32", "threads": 1, "device": "cpu"}
    return {**shared, "rows": 3, "window": 40, "letter": letter_of(material), **more}


def tokens_of(decoder: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    told = decoder.answer(prompts, new)
    assert told["whole"] > 0
    if told["tokens"] is not None:
        assert 0 < told["first"] <= told["whole"]
        return told["tokens"]
    assert all(0 < seconds < told["whole"] for seconds in told["each"])
    return [decoder.tokens(prompt, new) for prompt in prompts]


@pytest.mark.parametrize("rows", [1, 3])
def test_everybody_says_the_same_tokens(material: Material, rows: int) -> None:
    prompts = material.prompts(rows, 11, "test")
    ours = ours_decoding.Decoder(decoding(material))
    said = tokens_of(ours, prompts, 7)
    assert all(len(row) == 7 for row in said)
    if rows == 1:
        ours.way = "loop"
        assert tokens_of(ours, prompts, 7) == said
        assert set(ours.choose(prompts[0])["tried"]) == {"loop", "engine"}
    hf = pytest.importorskip("fathom.bench.peers.in_transformers")
    assert tokens_of(hf.Decoder(decoding(material, model=str(material.folder()))), prompts, 7) == said
    llama = pytest.importorskip("fathom.bench.peers.in_llama_cpp")
    assert tokens_of(llama.Decoder(decoding(material, model=str(material.gguf("f32")))), prompts, 7) == said


def test_a_parting_is_measured(material: Material) -> None:
    (prompt,) = material.prompts(1, 11, "test")
    ours = ours_decoding.Decoder(decoding(material))
    ((best, *_),) = tokens_of(ours, [prompt], 2)
    assert ours.gap(prompt, best, best) == 0
    assert ours.gap(prompt, best, (best + 1) % 257) > 0


def test_an_engine_under_load(material: Material) -> None:
    job = decoding(material, tokens=3 * 48, speculative=["off"])
    server = ours_decoding.Server(job)
    told = server.load("off", material.prompts(5, 11, "load"), 3, 6)
    assert told["tokens"] == 5 * 6
    assert len(told["first"]) == 5
    assert len(told["gaps"]) == 5 * 5
    assert all(made <= 3 for _, made in told["steps"])
    assert told["seconds"] > max(told["first"])
    cache = server.cache()
    assert cache["bytes"] == cache["tokens"] * material.cost.cache_bytes_per_token(4)
    assert server.engines["off"].stats().cache_blocks_used == 0


def test_the_data_path(material: Material, tmp_path: Path) -> None:
    job = {"model": material.native(), "texts": 2, "share": 0.008, "batch_size": 2, "sequence_length": 16}
    feeder = ours_feeding.Feeder({**job, "batches": 3, "cache": str(tmp_path)})
    encoded, stored, batched = feeder.encode(), feeder.shards(), feeder.batches()
    assert stored["tokens"] == encoded["tokens"] + 2  # the ends of two texts
    assert encoded["bytes"] == stored["bytes"] == encoded["tokens"]  # a byte a token
    assert (batched["tokens"], batched["bytes"]) == (3 * 2 * 16, 0)


def test_litgpt_has_as_many_weights_in_use() -> None:
    peer = pytest.importorskip("fathom.bench.peers.in_litgpt")
    shape = {"hidden_size": 512, "layers": 8, "heads": 8, "vocab_size": 50257, "length": 64}
    config = peer.dense(shape, 63_416_320)
    with torch.device("meta"):
        model = peer.GPT(config)
    used = sum(w.numel() for w in model.parameters()) - model.transformer.wte.weight.numel()
    assert used == pytest.approx(63_416_320, rel=0.01)
