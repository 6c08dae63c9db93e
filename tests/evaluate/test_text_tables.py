from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.batch import IGNORE
from fathom.evaluate.text import TextTable, text_batches
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.tokenizer.train import byte, gpt2, train_bpe

SOME = ["the cat sat on the mat\n\nthe  dog", "naïve café — 日本語 🎉", "tabs\tand\r\nlines   "]
TOKENIZERS: dict[str, Tokenizer] = {"bpe": train_bpe(SOME * 3, 300), "byte": byte()}


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="ab \n\té日🎉\x0b\u00a0", max_size=40),
    name=st.sampled_from(list(TOKENIZERS)),
    rows=st.integers(1, 3),
    length=st.integers(1, 7),
)
def test_bytes_and_words_of_a_text_do_not_depend_on_tokens_or_rows(
    text: str, name: str, rows: int, length: int
) -> None:
    tokenizer = TOKENIZERS[name]
    table = TextTable(tokenizer.token_bytes, tokenizer.vocab_size + 3)
    counts = [table.count(b) for b in text_batches(tokenizer.encode(text), tokenizer.eos_id, length, rows)]
    assert sum(int(size) for size, _ in counts) == len(text.encode())
    assert sum(int(words) for _, words in counts) == len(text.encode().split())


def test_real_text_through_gpt2() -> None:
    tokenizer = gpt2()
    text = "\n".join(SOME)
    table = TextTable(tokenizer.token_bytes, tokenizer.vocab_size)
    (batch,) = text_batches(tokenizer.encode(text), tokenizer.eos_id, 500, 1)
    size, words = table.count(batch)
    assert (int(size), int(words)) == (len(text.encode()), len(text.encode().split()))


def test_documents_are_apart_and_what_is_ignored_counts_nothing() -> None:
    tokenizer = byte()
    end = tokenizer.eos_id
    ids = [*tokenizer.encode("ab"), end, *tokenizer.encode("cd")]  # without white space between, and yet two words
    (batch,) = text_batches(ids, end, 99, 1)
    table = TextTable(tokenizer.token_bytes, tokenizer.vocab_size)
    assert [int(n) for n in table.count(batch)] == [4, 2]
    batch.targets[0, -2:] = IGNORE
    assert [int(n) for n in table.count(batch)] == [3, 2]


def test_every_token_is_a_target_once() -> None:
    ids = list(range(1, 24))
    batches = list(text_batches(ids, 0, 5, 2))
    assert [tuple(b.tokens.shape) for b in batches] == [(2, 5), (2, 5), (1, 4)]
    assert torch.cat([b.targets.flatten() for b in batches]).tolist() == [*ids, 0]
    assert torch.cat([b.tokens.flatten() for b in batches]).tolist() == [0, *ids]
    assert batches[0].positions.tolist() == [list(range(5))] * 2
    assert [b.targets.tolist() for b in text_batches([], 0, 5, 2)] == [[[0]]]
