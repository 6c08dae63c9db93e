"""The bytes of text that each token stands for, which is what turns nats a token into bits per byte.

Byte-level vocabularies are read directly: every character of a token is one byte, by GPT-2's table. Of others, a token
is worth what it adds to the decoded text of the token before it, or one byte where it is a byte fallback (`<0x0A>`).
"""

from __future__ import annotations

import json
import re

import tokenizers

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the rest for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def bytes_of_tokens(backend: tokenizers.Tokenizer, size: int) -> tuple[bytes, ...]:
    """For ids 0 to size - 1; b"" for special tokens and for ids without a token."""
    added = backend.get_added_tokens_decoder()
    decoder = json.dumps(json.loads(backend.to_str())["decoder"])
    table = byte_of_character() if '"ByteLevel"' in decoder else None
    anchor = next((i for i in range(size) if i not in added and backend.decode([i]).strip()), None)
    start = len(backend.decode([anchor])) if anchor is not None else 0

    def one(token_id: int) -> bytes:
        token = backend.id_to_token(token_id)
        if token is None or (token_id in added and added[token_id].special):
            return b""
        if token_id in added:
            return added[token_id].content.encode()
        if table is not None:
            return bytes(table[c] for c in token)
        fallback = _FALLBACK.fullmatch(token) if '"ByteFallback"' in decoder else None
        if fallback:
            return bytes([int(fallback[1], 16)])
        return backend.decode([token_id] if anchor is None else [anchor, token_id])[start:].encode()

    return tuple(one(i) for i in range(size))
