"""Mistakes in words: what was given, what is possible, what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types as limits

from fathom.config.shape import Model, Shape, addresses, bare, fields_of, shape_at
from fathom.config.text import Key, Node

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def describe(shape: Shape) -> str:
    """What may stand at a place: 'a whole number greater than 0, or null'."""
    if shape.tag is not None:
        said = f"a section with {shape.tag}: {' | '.join(shape.models)}"
    elif shape.models:
        said = "a section with the keys " + ", ".join(next(iter(shape.models.values())).model_fields)
    elif shape.many:
        said = _list(shape)
    elif shape.labels:
        said = " or ".join(_bare(member) for member in bare(shape))
    else:
        said = _bare(bare(shape)[0])
    bounds = [bound for bound in map(_bound, shape.limits) if bound]
    said = f"{said} {' and '.join(bounds)}".replace("and of at", "and at") if bounds else said
    return said + (", or null" if shape.optional else "")


def _bare(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(_shown(value) for value in get_args(annotation))
    return NAMES.get(annotation, getattr(annotation, "__name__", "something else"))


def _list(shape: Shape) -> str:
    inside = get_args(shape.annotation)
    if get_origin(shape.annotation) is tuple and Ellipsis not in inside:
        return f"a list of {len(inside)}: [{', '.join(_bare(member) for member in inside)}]"
    if shape.item is None or shape.item.models:
        return "a list of sections, each with a `- ` before its first key"
    plain = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}
    said = describe(shape.item)
    return f"a list of {plain.get(said, said)}, as [a, b]"


def _bound(limit: Any) -> str:
    words = {limits.Gt: "greater than", limits.Ge: "of at least", limits.Lt: "less than", limits.Le: "of at most"}
    for kind, word in words.items():
        if isinstance(limit, kind):
            return f"{word} {getattr(limit, kind.__name__.lower()):g}"
    if isinstance(limit, limits.MinLen):
        return f"with at least {limit.min_length} item{'s' if limit.min_length > 1 else ''}"
    if isinstance(limit, limits.MaxLen):
        return f"with at most {limit.max_length} item{'s' if limit.max_length > 1 else ''}"
    return ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def given(node: Node | None, value: Any) -> str:
    """What was written, as it was written."""
    if isinstance(value, dict):
        return "a section with the keys " + ", ".join(map(str, value)) if value else "an empty section"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing" if node is not None and node.written == "" else "null"
    if node is not None and node.written is not None and not isinstance(value, str):
        return node.written
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    return _shown(value)


def advice(shape: Shape, node: Node | None, value: Any) -> str:
    """What to write instead, where that is plain to see; or an empty text."""
    if shape.optional and str(value).lower() in ("none", "nil", "no", "off", "false", ""):
        return "write null"
    kinds = bare(shape)
    only = kinds[0] if len(kinds) == 1 else None
    if only in (int, float) and isinstance(value, str):
        return _as_number(value, only)
    if only is int and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if only is bool and isinstance(value, str | int):
        truth = {"true": "true", "1": "true", "false": "false", "0": "false"}.get(str(value).lower())
        return f"write {truth}" + (" without quotes" if isinstance(value, str) else "") if truth else ""
    if only in (str, Path) and isinstance(value, dict) and len(value) == 1 and node is not None:
        key, part = next(iter(node.value.items()))
        return f"put it in quotes: '{key}: {part.value}'"
    if only in (str, Path) and isinstance(value, bool | int | float):
        return f"put it in quotes: '{node.written if node is not None and node.written else value}'"
    if shape.many and isinstance(value, str | int | float | bool) and not (shape.item and shape.item.models):
        return f"write [{value}]"
    if shape.many and shape.item and shape.item.models and isinstance(value, dict):
        return "write `- ` before its first key"
    if shape.tag is not None and isinstance(value, str) and value in shape.models:
        return f"write {shape.tag}: {value} inside the section"
    options = get_args(only) if get_origin(only) is Literal else ()
    near = nearest(str(value), [_shown(option) for option in options])
    return f"did you mean {near}?" if near and options else ""


def _as_number(value: str, wanted: type) -> str:
    text = value.strip().lower()
    share = re.fullmatch(r"([0-9.]+) ?%", text)
    if share and wanted is float:
        return f"write {float(share.group(1)) / 100:g}"
    suffixed = re.fullmatch(r"([0-9.]+) ?(k|m|b|million|billion)", text)
    if suffixed:
        size = {"k": 10**3, "m": 10**6, "million": 10**6, "b": 10**9, "billion": 10**9}[suffixed.group(2)]
        return f"write {round(float(suffixed.group(1)) * size)}"
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text):
        return f"write {text.replace(',', '')}"
    if re.fullmatch(r"[0-9]+,[0-9]+", text):
        return f"write {text.replace(',', '.')}"
    try:
        float(text)
    except ValueError:
        return ""
    return "take the quotes off"


def nearest(word: str, words: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The likest of some words, or None."""
    same = {_folded(known): known for known in words}
    found = difflib.get_close_matches(_folded(word), list(same), n=1, cutoff=cutoff)
    return same[found[0]] if found else None


def _folded(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")


def unknown_key(
    root: Model, path: Sequence[Key], data: Any, said: Mapping[Key, Any], synonyms: Mapping[str, str]
) -> tuple[str, tuple[str, ...] | None]:
    """(the words, the path that was probably meant): a near key of the section, of another kind, of another section.

    data: the whole tree with defaults; said: the section as the user wrote it.
    """
    section, key = tuple(path[:-1]), str(path[-1])
    shape, _ = shape_at(root, section, data)
    written = data
    for step in section:
        written = written[step]
    model = shape.model(written) if shape is not None else None
    known = list(model.model_fields) if model is not None else []

    near = nearest(key, known, 0.8)
    if near:
        return f"unknown key; did you mean {near}?", (*map(str, section), near)
    if shape is not None and shape.tag is not None:
        kinds = [tag for tag, member in shape.models.items() if key in member.model_fields]
        if kinds:
            here = written[shape.tag] + ("" if shape.tag in said else " (the default)")
            return f"unknown key for kind: {here}; it belongs to kind: {' | '.join(kinds)}", None
    elsewhere = _elsewhere(root, key, synonyms)
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?", tuple(elsewhere[0].partition(" ")[0].split("."))
    near = nearest(key, known, 0.6)
    if near:
        return f"unknown key; did you mean {near}? possible are {', '.join(known)}", (*map(str, section), near)
    return f"unknown key; possible are {', '.join(known)}", None


def _elsewhere(root: Model, key: str, synonyms: Mapping[str, str]) -> list[str]:
    if _folded(key) in synonyms:
        return [synonyms[_folded(key)]]
    places = list(addresses(root))
    known = {address[-1] for address, _ in places}
    name = next((known_key for known_key in known if known_key == _folded(key)), None) or nearest(
        key, sorted(known), 0.85
    )
    kinds: dict[str, list[str]] = {}
    for address, kind in places:
        if address[-1] == name:
            kinds.setdefault(".".join(address), []).append(kind)
    found = [address + (f" (kind: {of[0]})" if len(of) == 1 and of[0] else "") for address, of in kinds.items()]
    return found if len(found) <= 3 else []


def needs_kind(shape: Shape, value: Mapping[str, Any]) -> str:
    """A section without its `kind`."""
    fitting = [tag for tag, model in shape.models.items() if value and set(value) <= set(fields_of(model))]
    said = f"needs a {shape.tag}: {' | '.join(shape.models)}"
    return said + (f"; its keys are those of {shape.tag}: {fitting[0]}" if len(fitting) == 1 else "")
