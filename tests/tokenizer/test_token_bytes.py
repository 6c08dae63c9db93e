"""Bytes of tokens, over every kind of tokenizer: what is decoded is what they say."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from fathom.tokenizer.token_bytes import byte_of_character
from fathom.tokenizer.tokenizer import END_OF_TEXT, Tokenizer
from fathom.tokenizer.train import byte, character, deepseek, gpt2, train_bpe

TEXT = "Hello wörld — naïve\n\n  日本語 🎉 foo\u00a0bar\tx"


@pytest.mark.parametrize("make", [gpt2, deepseek, byte, lambda: character([TEXT]), lambda: train_bpe([TEXT] * 9, 280)])
def test_tokens_of_a_text_have_its_bytes(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer: Tokenizer = make()
    table = tokenizer.token_bytes
    assert len(table) == tokenizer.vocab_size
    assert b"".join(table[i] for i in tokenizer.encode(TEXT)) == TEXT.encode()
    assert table[tokenizer.eos_id] == b""


def sentencepiece() -> Tokenizer:
    """A vocabulary in SentencePiece's manner: spaces as ▁, single bytes where a character is unknown."""
    pieces = ["<unk>", *[f"<0x{b:02X}>" for b in range(256)], "▁", "a", "b", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    backend = Backend(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    backend.add_tokens([AddedToken("[tag]", special=False)])
    return Tokenizer(backend)


def test_sentencepiece() -> None:
    tokenizer = sentencepiece()
    table = tokenizer.token_bytes
    assert b"".join(table[i] for i in tokenizer.encode("ab ba éa")) == " ab ba éa".encode()
    assert table[tokenizer.backend.token_to_id("[tag]")] == b"[tag]"
    assert table[tokenizer.eos_id] == b""


def test_the_table_of_byte_characters() -> None:
    table = byte_of_character()
    assert sorted(table.values()) == list(range(256))
    assert (table["Ġ"], table["Ċ"], table["a"]) == (32, 10, 97)
