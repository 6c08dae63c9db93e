"""Token ids as text, `12 7 905`: the tokenizer of a model that came without one, so that it can be used nonetheless."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from fathom.tokenizer.tokenizer import Tokenizer


def of_ids(vocab_size: int, end: int) -> Tokenizer:
    """A tokenizer whose words are the numbers below vocab_size; end: the id that ends a text."""
    backend = Backend(models.WordLevel(vocab={str(i): i for i in range(vocab_size)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, eos=str(end))


def is_of_ids(tokenizer: Tokenizer) -> bool:
    """Whether every word is its own id."""
    return all(tokenizer.backend.id_to_token(i) == str(i) for i in range(tokenizer.vocab_size))
