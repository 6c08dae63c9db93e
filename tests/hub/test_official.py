"""Checkpoints as DeepSeek releases them: FP8 in blocks, shards with an index, MTP with copies of embedding and head."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_model
from safetensors.torch import load_file, save_file
from tiny_models import close, tiny_model, tokens_of
from torch import Tensor

from fathom.errors import CheckpointError, ConfigError
from fathom.hub.fp8 import dequantise
from fathom.hub.huggingface import export, pretrained, weights_of
from fathom.hub.shards import Shards, Spec, planned, write_shards
from fathom.tokenizer.train import byte, gpt2

transformers = pytest.importorskip("transformers")


def rewritten(folder: Path, change: Any) -> None:
    """Pass every tensor of a folder through a function (name, tensor) -> tensors, and write one file."""
    found = Shards(folder)
    out: dict[str, Tensor] = {}
    for name in found:
        out |= change(name, found[name].clone())
    for path in folder.glob("model*"):
        path.unlink()
    save_file(out, folder / "model.safetensors")


def test_fp8_blocks_are_dequantised(tmp_path: Path) -> None:
    attention = {"kind": "mla", "num_attention_heads": 4, "q_lora_rank": 130, "kv_lora_rank": 136,
                 "qk_nope_head_dim": 40, "qk_rope_head_dim": 8, "v_head_dim": 32}  # fmt: skip
    model = tiny_model(attention, "v3", depths=1, hidden_size=150, intermediate_size=260)
    export(model.config, weights_of(model), tmp_path / "out", shard_bytes=100_000)
    wanted: dict[str, Tensor] = {}

    def quantised(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith("_proj.weight") or tensor.dim() != 2:
            return {name: tensor}
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scale = torch.rand(rows, columns) + 0.5
        stored = tensor.to(torch.float8_e4m3fn)
        wanted[name] = torch.stack([
            torch.stack([stored[i, j].float() * scale[i // 128, j // 128] for j in range(tensor.shape[1])])
            for i in range(min(tensor.shape[0], 3))
        ])  # fmt: skip
        return {name: stored, f"{name}_scale_inv": scale}

    rewritten(tmp_path / "out", quantised)
    keys = json.loads((tmp_path / "out/config.json").read_text())
    keys["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "out/config.json").write_text(json.dumps(keys))
    read = dict(pretrained(tmp_path / "out").tensors())
    assert len(wanted) > 10
    for name, rows in wanted.items():
        if name in read:
            assert torch.equal(read[name][:3], rows), name
    assert not any("scale_inv" in name for name in read)


def test_dequantise_counts_blocks() -> None:
    weight = torch.ones(3, 5).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    want = torch.tensor([[1.0, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]])
    assert torch.equal(dequantise(weight, scale, (2, 2)), want)


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_fp8_without_its_scale(tmp_path: Path, fault: str) -> None:
    model = random_model("deepseek_v3", 1)
    export(model.config, weights_of(model), tmp_path / "out")
    name = "model.layers.0.self_attn.o_proj.weight"

    def broken(found: str, tensor: Tensor) -> dict[str, Tensor]:
        if found != name:
            return {found: tensor}
        scale = {} if fault == "missing" else {f"{name}_scale_inv": torch.ones(2, 1)}
        return {name: tensor.to(torch.float8_e4m3fn), **scale}

    rewritten(tmp_path / "out", broken)
    with pytest.raises(CheckpointError, match=r"o_proj\.weight_scale_inv"):
        pretrained(tmp_path / "out")


def test_mtp_layers_go_and_come(tmp_path: Path) -> None:
    model = random_model("deepseek_v3", 2, depths=2)
    layers = model.config.num_hidden_layers
    export(model.config, weights_of(model), tmp_path / "out", mtp=True)
    keys = json.loads((tmp_path / "out/config.json").read_text())
    assert keys["num_nextn_predict_layers"] == 2
    written = load_file(tmp_path / "out/model.safetensors")
    head = written["model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"]
    for depth in (layers, layers + 1):
        assert torch.equal(written[f"model.layers.{depth}.embed_tokens.weight"], written["model.embed_tokens.weight"])
        assert torch.equal(written[f"model.layers.{depth}.shared_head.head.weight"], head)
    back = pretrained(tmp_path / "out").model()
    assert all(torch.equal(back.state_dict()[n], w) for n, w in model.state_dict().items())
    export(model.config, weights_of(model), tmp_path / "plain", mtp=False)
    assert not any(f"layers.{layers}." in name for name in Shards(tmp_path / "plain"))
    assert pretrained(tmp_path / "plain").config.mtp.num_nextn_predict_layers == 0


def test_mtp_copies_must_be_copies_and_may_be_absent(tmp_path: Path) -> None:
    model = random_model("deepseek_v3", 2, depths=1)
    export(model.config, weights_of(model), tmp_path / "out")
    prefix = f"model.layers.{model.config.num_hidden_layers}"
    rewritten(tmp_path / "out", lambda n, t: {n: t + (n == f"{prefix}.embed_tokens.weight")})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight differs"):
        pretrained(tmp_path / "out").model()
    rewritten(tmp_path / "out", lambda n, t: {} if n.startswith(prefix) and "embed" in n else {n: t})
    assert pretrained(tmp_path / "out").config.mtp.num_nextn_predict_layers == 1
    rewritten(tmp_path / "out", lambda n, t: {} if n.startswith(prefix) else {n: t})
    assert pretrained(tmp_path / "out").config.mtp.num_nextn_predict_layers == 0  # config.json still says 1


def test_mtp_where_there_is_no_place_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("gqa", "seed", depths=1)
    none = tiny_model("mla", "v3", depths=0)
    with pytest.raises(ConfigError, match="the model has none"):
        export(none.config, weights_of(none), tmp_path / "out", mtp=True)
    with pytest.raises(ConfigError, match="it has MTP"):
        export(model.config, weights_of(model), tmp_path / "out", mtp=True)
    export(model.config, weights_of(model), tmp_path / "out")
    assert "MTP layers are left out" in caplog.text


def test_transformers_drafts_with_our_mtp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("deepseek_v3", 4, depths=1)
    export(model.config, weights_of(model), tmp_path / "out")
    count = model.config.num_hidden_layers
    theirs = transformers.DeepseekV3ForCausalLM
    monkeypatch.setattr(theirs, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{count}.*"])
    other = theirs.from_pretrained(tmp_path / "out", experts_implementation="eager").eval()
    prompt = tokens_of(1, 5)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    drafted, plain = other.generate(prompt, use_mtp=True, **options), other.generate(prompt, **options)
    assert torch.equal(drafted, plain)
    tokens = prompt
    with torch.no_grad():
        for _ in range(10):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(plain, tokens)


def test_a_shared_expert_of_mtp_alone_is_kept(tmp_path: Path) -> None:
    model = tiny_model("mla", "v3", depths=1)
    model.layers[1].mlp.shared_experts.down_proj.weight.data.zero_()
    export(model.config, weights_of(model), tmp_path / "out")
    back = pretrained(tmp_path / "out").model()
    assert all(torch.equal(back.state_dict()[n], w) for n, w in model.state_dict().items())


def test_rotary_halves_are_turned_into_pairs(tmp_path: Path) -> None:
    model = tiny_model("mla_low_rank", "v3", depths=0)
    export(model.config, weights_of(model), tmp_path / "out")
    keys = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**keys, "rope_interleave": False}))
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    with torch.no_grad():
        reference = other(tokens_of(2, 9), use_cache=False).logits
        assert close(pretrained(tmp_path / "out").model()(tokens_of(2, 9)), reference, 1e-4)
        assert not close(model(tokens_of(2, 9)), reference, 1e-4)


def test_tokenizer_travels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_model("mla", "v3", vocab_size=300), byte()
    export(model.config, weights_of(model), tmp_path / "out", tokenizer)
    found = pretrained(tmp_path / "out")
    assert found.tokenizer is not None
    assert found.tokenizer.encode("Gauß, é") == tokenizer.encode("Gauß, é")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("Gauß, é")["input_ids"] == tokenizer.encode("Gauß, é")
    keys = json.loads((tmp_path / "out/config.json").read_text())
    assert (keys["eos_token_id"], keys["pad_token_id"]) == (tokenizer.eos_id, None)
    (tmp_path / "out/tokenizer.json").unlink()
    assert pretrained(tmp_path / "out").tokenizer is None
    assert "token ids only" in caplog.text
    gpt2().save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="50257 tokens"):
        pretrained(tmp_path / "out")


def test_dtypes(tmp_path: Path) -> None:
    model = random_model("deepseek_v3", 1)
    export(model.config, weights_of(model), tmp_path / "out", dtype="bfloat16")
    written = load_file(tmp_path / "out/model.safetensors")
    kinds = {n.endswith("bias"): t.dtype for n, t in written.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    for name, weight in pretrained(tmp_path / "out").model().state_dict().items():
        mine = model.state_dict()[name]
        assert torch.equal(weight, mine if name.endswith("bias") else mine.bfloat16().float())


def test_a_run_keeps_it_in_one_file(tmp_path: Path) -> None:
    model = random_model("deepseek_v3", 1, depths=1)
    export(model.config, weights_of(model), tmp_path / "out", shard_bytes=10_000)
    assert pretrained(tmp_path / "out").save(tmp_path) == ["model.safetensors"]
    kept, wanted = load_file(tmp_path / "model.safetensors"), weights_of(model)
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[n], t) for n, t in wanted.items())
    export(model.config, Shards(tmp_path), tmp_path / "again")  # a checkpoint goes out without a model in memory


class Alive:
    """Counts the bytes of tensors that are alive at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def watch(self, tensor: Tensor) -> Tensor:
        fresh = tensor.clone()
        self.now += fresh.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(fresh, self.gone, fresh.nbytes)
        return fresh

    def gone(self, size: int) -> None:
        self.now -= size


def test_memory_stays_under_two_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shard = random_model("deepseek_v3", 1, depths=1), 10_000
    export(model.config, weights_of(model), tmp_path / "first", shard_bytes=shard)
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 10
    alive, read = Alive(), Shards.__getitem__
    monkeypatch.setattr(Shards, "__getitem__", lambda self, name: alive.watch(read(self, name)))
    pretrained(tmp_path / "first").save(tmp_path)
    export(model.config, Shards(tmp_path), tmp_path / "second", shard_bytes=shard)
    assert 0 < alive.most <= 2 * shard


def test_shards_are_planned_by_size(tmp_path: Path) -> None:
    specs = {n: Spec(torch.float32, (size,)) for n, size in (("a", 3), ("b", 2), ("c", 9), ("d", 1))}
    assert list(planned(specs, 20).values()) == [["a", "b"], ["c"], ["d"]]
    assert planned(specs, 1000) == {"model.safetensors": ["a", "b", "c", "d"]}
    mixed = {"x": Spec(torch.bfloat16, (3,)), "y": Spec(torch.float32, (2, 0)), "z": Spec(torch.float64, (1,))}
    tensors = {n: torch.full(s.shape, 7, dtype=s.dtype) for n, s in mixed.items()}
    write_shards(tmp_path, mixed, tensors.items())
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(tmp_path / "model.safetensors").items())
    with pytest.raises(ValueError, match="announced"):
        write_shards(tmp_path, mixed, {"x": tensors["y"]}.items())
