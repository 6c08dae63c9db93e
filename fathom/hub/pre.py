"""A tokenizer's splitting rule under the name that llama.cpp has for it.

llama.cpp compiles its splitting rules in and picks one by `tokenizer.ggml.pre`. Its converter knows a tokenizer by a
hash of how it splits a sample text, and refuses all self-trained ones; the rule itself is enough to know which it is.
"""

from __future__ import annotations

import json
from typing import Any

from fathom.tokenizer.tokenizer import Tokenizer

_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_LINES = "[\r\n]"
_V3 = _MARKS + "|[^\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+" + f"{_LINES}*" + r"|\s*" + f"{_LINES}+"
SPLITS = {
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _V3 + r"|\s+(?!\S)|\s+"): "deepseek-v3",
    (_CASES + r"\p{N}{1,3}" + _END,): "llama-bpe",
    (_CASES + r"\p{N}" + _END,): "qwen2",
}


def pre_tokenizer(tokenizer: Tokenizer) -> str | None:
    """The name of the rule that splits texts as this tokenizer does; None if llama.cpp has none."""
    whole = json.loads(tokenizer.backend.to_str())
    model, normalizer = whole["model"], whole.get("normalizer")
    if model.get("type") != "BPE" or (normalizer is not None and normalizer.get("normalizers") != []):
        return None
    steps = _steps(whole.get("pre_tokenizer"))
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1 and (steps[-1]["use_regex"] or not model["merges"]):
        return "gpt-2"  # without merges a token is a byte, however the text is split
    splits = [step for step in steps[:-1] if step["type"] == "Split" and step["behavior"] == "Isolated"]
    if len(splits) != len(steps) - 1 or steps[-1]["use_regex"]:
        return None
    return SPLITS.get(tuple(str(step["pattern"].get("Regex")) for step in splits))


def _steps(said: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The pre-tokenizers that are applied one after the other."""
    if said is None:
        return []
    return list(said["pretokenizers"]) if said["type"] == "Sequence" else [said]
