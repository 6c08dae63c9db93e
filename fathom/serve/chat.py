"""Conversations -> prompts: the plain template that runs have, or the Jinja template of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import tokenizers

from fathom.errors import DependencyError, RequestError, TokenizerError
from fathom.tokenizer import chat as plain
from fathom.tokenizer.chat import Message
from fathom.tokenizer.tokenizer import Tokenizer


class ChatTemplate(Protocol):
    """stops: texts that end an answer, because somebody else begins to speak; source: the template in Jinja."""

    @property
    def stops(self) -> tuple[str, ...]: ...

    @property
    def source(self) -> str: ...

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """The tokens that the model continues. RequestError: the template refuses the conversation."""


class PlainChat:
    """`User: ...`, as in `fathom chat`. Answers come with the space after the colon, and are put back without it."""

    stops, source = plain.STOPS, plain.JINJA

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        said: list[Message] = [
            {**m, "content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages
        ]
        return self.tokenizer.encode(plain.render(said, add_generation_prompt))


class JinjaChat:
    """A template in Jinja, as `tokenizer_config.json` and `chat_template.jinja` hold it, in Jinja's sandbox. Special
    tokens in the rendered text are special, as in transformers. TokenizerError: it is no template."""

    stops: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise DependencyError(
                "This model has a chat template in Jinja; install what serving needs: pip install 'fathom-lm[serve]'"
            ) from None
        self._error = TemplateError
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = self._refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise TokenizerError(f"The model's chat template is no Jinja template: {error}") from None
        self.source = source
        self._names = {"bos_token": tokenizer.bos or "", "eos_token": tokenizer.eos}
        # A backend of its own: the tokenizer's takes special tokens in a text for text, and that is a switch.
        tokenizer.backend.encode_special_tokens = False
        try:
            self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        finally:
            tokenizer.backend.encode_special_tokens = True

    def _refuse(self, message: str) -> Any:
        raise self._error(message)

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._names,
            )
        except Exception as error:  # a template is a program of somebody else's; the conversation is what it refused
            raise RequestError(f"The model's chat template refuses these messages: {error}") from None
        return self._backend.encode(text, add_special_tokens=False).ids


def template_of(tokenizer: Tokenizer, source: str | None) -> ChatTemplate:
    """The template in Jinja where a model brings one, else the plain one."""
    return PlainChat(tokenizer) if source is None else JinjaChat(tokenizer, source)
