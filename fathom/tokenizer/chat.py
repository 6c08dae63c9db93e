"""Chat: messages -> one prompt.

A model trained on plain text knows no roles, so the default template is the plainest that reads like a dialogue. A
tokenizer folder may bring its own `chat_template` for other programs; the same default is written there in Jinja, so
that `transformers` renders the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from fathom.errors import RequestError

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}

JINJA = (
    "{% for m in messages %}{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m['role']] }}: "
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Message(TypedDict):
    """One turn: role is system, user or assistant."""

    role: str
    content: str


def render(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """`User: ...\\nAssistant:` — the text that the model continues."""
    lines = []
    for message in messages:
        if message["role"] not in ROLES:
            raise RequestError(f"A message has the role {message['role']!r}; possible are {', '.join(ROLES)}.")
        lines.append(f"{ROLES[message['role']]}: {message['content']}\n")
    return "".join(lines) + ("Assistant:" if add_generation_prompt else "")


STOPS = ("\nUser:", "\nSystem:")
"""Where an answer ends: the model begins to speak for somebody else."""
