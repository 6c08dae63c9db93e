"""Text and numbers as they stand on the page. Everything that comes from a run passes through `esc`."""

from __future__ import annotations

import html
import re
from typing import Any

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def esc(value: object) -> str:
    """Text for HTML: markup is escaped, control characters are shown (␀), half surrogates replaced."""
    text = str(value).replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    return html.escape(CONTROLS.sub(_picture, text))


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def slug(number: int, name: str = "") -> str:
    """A prefix of ids: r0-."""
    return f"r{number}-{name}"


def count(number: float) -> str:
    """15.7B, 84.5M, 1,234."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number / size:.0f}{letter}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """45 s, 12 min 30 s, 5 h 12 min, 3.1 days."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if seconds < 2 * 86400:
        return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"
    return f"{seconds / 86400:.1f} days"


def flat(tree: Any, path: str = "") -> dict[str, str]:
    """Dotted key -> value as text; lists of plain values stand on one line."""
    if isinstance(tree, dict) and tree:
        found: dict[str, str] = {}
        for key, value in tree.items():
            found |= flat(value, f"{path}.{key}" if path else str(key))
        return found
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return flat({str(i): item for i, item in enumerate(tree)}, path)
    return {path: _plain(tree)}


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
