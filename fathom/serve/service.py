"""What is served, and what the server allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import Field

from fathom.knobs import Knobs, Many
from fathom.serve.answers import ModelDetails
from fathom.serve.chat import ChatTemplate
from fathom.serve.exchange import Deliver
from fathom.serve.worker import Worker
from fathom.tokenizer.tokenizer import Tokenizer


class ServerConfig(Knobs):
    """What the server allows."""

    api_keys: Many[str] = ()
    """Keys that callers must have; none: everybody may call."""
    requests_per_minute: int | None = Field(default=None, gt=0)
    """Of each key, or of each address where there are no keys; null: as many as they like."""
    tokens_per_minute: int | None = Field(default=None, gt=0)
    """Of prompts and answers together; null: as many as they like."""
    max_body: int = Field(default=4 << 20, gt=0)
    """Bytes of a request's body."""
    body_timeout: float = Field(default=30.0, gt=0)
    """Seconds in which a body has to come."""
    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """Tokens of a prompt; null: as many as the window holds."""
    max_output_tokens: int | None = Field(default=None, gt=0)
    """Tokens of an answer; null: as many as the window holds."""
    max_choices: int = Field(default=128, gt=0)
    """Answers of one request: prompts times n."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds after which a request is given up; the header x-request-timeout asks for less."""
    cors_origins: Many[str] = ()
    """Origins of web pages that may call from a browser (`*`: all); none: no page may."""


@dataclass(frozen=True)
class Service:
    """What is served.

    names       of the model, the first of which is told; window, vocabulary: of the model, in tokens
    details     what /v1/models tells about it
    special     whether texts get the tokenizer's own special tokens, as a Hugging Face folder's do
    worker      makes the worker, given whom to hand its news to
    """

    names: tuple[str, ...]
    window: int
    vocabulary: int
    details: ModelDetails
    tokenizer: Tokenizer
    chat: ChatTemplate
    worker: Callable[[Deliver], Worker]
    special: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
