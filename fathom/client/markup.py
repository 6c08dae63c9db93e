"""Text and numbers as they stand on the page. Everything that comes from a model or a server passes through `esc`."""

from __future__ import annotations

import html
import re

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})


def esc(text: object) -> str:
    """Text for HTML, for attributes too: markup is escaped, control characters are shown (␀), half surrogates replaced.
    `{`, `$` and backticks are written as numbers, since Gradio's HTML component has templates that read them."""
    known = str(text).replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[{}$`]", lambda c: f"&#{ord(c[0])};", html.escape(CONTROLS.sub(_picture, known)))


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def visible(text: str) -> str:
    """White space as signs: `·the`, `↵`; not escaped."""
    return CONTROLS.sub(_picture, text).translate(VISIBLE)


def count(number: float) -> str:
    """15.7B, 84.5M, 1,234."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number / size:.0f}{letter}"
    return f"{number:,.0f}"


def plural(number: int, word: str) -> str:
    """1 token, 2 tokens."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
