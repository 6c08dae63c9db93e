"""The tokenizer of a model that came without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.errors import TokenizerError
from fathom.tokenizer.ids import is_of_ids, of_ids
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.tokenizer.train import byte


def test_numbers_are_words(tmp_path: Path) -> None:
    of_ids(1009, 5).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = [12, 0, 1008, 5, 7]
    assert tokenizer.encode("12 0\n1008  5 7") == ids
    assert tokenizer.decode(ids) == "12 0 1008 5 7"
    stream = tokenizer.stream()
    assert "".join([*(stream.push(i) for i in ids), stream.finish()]) == tokenizer.decode(ids)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (1009, 5)


@pytest.mark.parametrize("text", ["12 hello", "1009", "07", "-1"])
def test_other_words_are_refused(text: str) -> None:
    tokenizer = of_ids(1009, 5)
    with pytest.raises(TokenizerError, match="numbers"):
        tokenizer.encode(text)
    with pytest.raises(TokenizerError, match="numbers"):
        tokenizer.encode_batch(["1", text])


def test_a_bug_is_no_user_error() -> None:
    with pytest.raises(TypeError):
        of_ids(5, 1).encode(7)  # type: ignore[arg-type]


def test_it_is_told_from_others() -> None:
    assert is_of_ids(of_ids(300, 299))
    assert not is_of_ids(byte())
