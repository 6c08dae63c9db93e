from __future__ import annotations

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from fathom.errors import RequestError, TokenizerError
from fathom.serve.chat import JinjaChat, PlainChat, template_of
from fathom.tokenizer.chat import JINJA, Message, render
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.tokenizer.train import byte

SAID: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def words() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<|user|>": 2, "</s>": 3, "<": 4}, unk_token="<"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|user|>", "</s>"])
    return Tokenizer(backend)


def test_our_template_in_jinja_is_our_template() -> None:
    tokenizer = byte()
    for generation in (True, False):
        ids = JinjaChat(tokenizer, JINJA).encode(SAID, generation)
        assert ids == PlainChat(tokenizer).encode(SAID, generation) == tokenizer.encode(render(SAID, generation))
    assert PlainChat(tokenizer).stops
    assert not JinjaChat(tokenizer, JINJA).stops


def test_a_templates_special_tokens_are_special() -> None:
    tokenizer = words()
    source = "{% for m in messages %}<|user|> {{ m.content }} {{ eos_token }}{% endfor %}"
    assert JinjaChat(tokenizer, source).encode(SAID, True) == [2, 0, 3, 2, 1, 3]
    assert 2 not in tokenizer.encode("<|user|>"), "elsewhere they are text, as before"


def test_templates_are_kept_in_a_sandbox() -> None:
    tokenizer = byte()
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('only one turn') }}",
        "{{ nothing.at.all }}",
    ):
        with pytest.raises(RequestError, match="refuses these messages"):
            JinjaChat(tokenizer, source).encode(SAID, True)
    with pytest.raises(TokenizerError, match="no Jinja template"):
        JinjaChat(tokenizer, "{% for %}")


def test_the_plain_one_unless_there_is_another() -> None:
    tokenizer = byte()
    assert isinstance(template_of(tokenizer, None), PlainChat)
    assert isinstance(template_of(tokenizer, "x"), JinjaChat)
