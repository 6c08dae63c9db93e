"""A tree of YAML -> a frozen configuration class, or one error that names every mistake with file and line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from fathom.config.file import Tree, dotted, merge
from fathom.config.shape import Model, Shape, bare, field_shape, fields_of, shape_at, written_path
from fathom.config.text import Key, Node, Place, lay
from fathom.config.words import advice, describe, given, nearest, needs_kind, unknown_key
from fathom.errors import ConfigError, UserError

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Mistake:
    """One line of the message."""

    place: Place
    path: tuple[Key, ...]
    text: str
    about_length: bool = False

    def __str__(self) -> str:
        where = f"{dotted(self.path)}: " if self.path else ""
        return f"{self.place}: {where}{self.text}"


def parse(tree: Tree, cls: type[Config], synonyms: Mapping[str, str] | None = None) -> Config:
    """The configuration that a tree describes.

    A section that is only partly written is laid over the class's default for it, so a `kind` may be left out where it
    has a default. synonyms: names of other kits -> address here, for the hints.

    ConfigError: all mistakes at once, each `file:line: key.path: what was given; what is possible; what was meant`.
    """
    whole = Shape(models={"": cls})
    data = _typed(whole, _over_defaults(whole, tree.root).plain())
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        mistakes = _mistakes(error, tree, cls, data, synonyms or {})
        raise ConfigError(_message(mistakes)) from None
    except UserError as error:
        raise ConfigError(f"{tree.source}: {error}") from None


def _message(mistakes: Sequence[Mistake]) -> str:
    if len(mistakes) == 1:
        return str(mistakes[0])
    return "\n  ".join([f"{len(mistakes)} mistakes in the configuration:", *map(str, mistakes)])


def _over_defaults(shape: Shape, node: Node) -> Node:
    """The node with what the defaults of its fields say about sections that it writes in part."""
    if isinstance(node.value, list) and shape.many and shape.item is not None:
        return Node([_over_defaults(shape.item, item) for item in node.value], node.place, node.written)
    model = shape.model({key: part.value for key, part in node.value.items()}) if isinstance(node.value, dict) else None
    if model is None:
        return node
    filled = dict(node.value)
    for name, info in model.model_fields.items():
        part = filled.get(name)
        if part is None or not isinstance(part.value, dict):
            continue
        inner, default = field_shape(info), info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            said = default.model_dump(mode="json", exclude_unset=True)
            if inner.tag is not None:
                said = {inner.tag: getattr(default, inner.tag), **said}
            part = merge(lay(said, part.place), part, ())
        filled[name] = _over_defaults(inner, part)
    return Node(filled, node.place)


def _typed(shape: Shape | None, value: Any) -> Any:
    """The value with tuples and paths where the class wants them, since YAML has neither and the classes are strict."""
    if shape is None:
        return value
    if isinstance(value, list):
        items = [_typed(shape.item, item) for item in value]
        return tuple(items) if shape.many and get_origin(shape.annotation) is tuple else items
    if isinstance(value, dict):
        model = shape.model(value)
        inner = {} if model is None else fields_of(model)
        return {key: _typed(inner.get(key) if model is not None else shape.item, part) for key, part in value.items()}
    return Path(value) if isinstance(value, str) and Path in bare(shape) else value


def _mistakes(error: ValidationError, tree: Tree, cls: Model, data: Any, synonyms: Mapping[str, str]) -> list[Mistake]:
    found: dict[tuple[Key, ...], Mistake] = {}
    missing: list[tuple[Key, ...]] = []
    meant: set[tuple[str, ...]] = set()
    for item in error.errors(include_url=False):
        path = written_path(cls, item["loc"], data)
        if path in found:
            continue  # a union without a tag complains once a member
        if item["type"] == "extra_forbidden":
            section = tree.find(path[:-1])
            text, target = unknown_key(cls, path, data, section.value if section is not None else {}, synonyms)
            if target is not None:
                meant.add(target)
        elif item["type"] == "value_error":
            path, text = _own_words(item, path, tree, cls)
        else:
            text = _words(item, path, tree, cls, data)
            if item["type"] == "missing":
                missing.append(path)
        found[path] = Mistake(tree.place(path), path, text, item["type"] in ("too_short", "too_long"))
    for path in [path for path in found if any(other[: len(path)] == path for other in found if other != path)]:
        if found[path].about_length:  # pydantic counts only items without mistakes
            del found[path]
    for path in missing:  # a key that is missing because it was misspelt is one mistake
        if tuple(map(str, path)) in meant:
            del found[path]
    return sorted(found.values(), key=lambda m: (m.place.line is None, m.place.source, m.place.line or 0))


def _words(item: Any, path: tuple[Key, ...], tree: Tree, cls: Model, data: Any) -> str:
    shape, info = shape_at(cls, path, data)
    node, value = tree.find(path), item["input"]
    shape = shape or Shape()
    if item["type"] == "missing":
        said = " ".join((info.description if info is not None and info.description else "").split())
        about = f" ({said.rstrip('.')})" if " " in said else ""
        return f"is missing; it must be {describe(shape)}{about}"
    if item["type"] == "union_tag_not_found":
        return needs_kind(shape, value if isinstance(value, dict) else {})
    if item["type"] == "union_tag_invalid":
        kind = value.get(shape.tag) if isinstance(value, dict) else None
        near = nearest(str(kind), list(shape.models))
        hint = f"; did you mean {near}?" if near else ""
        return f"there is no {shape.tag}: {kind}; possible are {' | '.join(shape.models)}{hint}"
    if shape.annotation is Any:
        return f"given {given(node, value)}; {item['msg']}"
    hint = advice(shape, node, value)
    if value is None and shape.models and info is not None and not info.is_required():
        hint = "leave the key out to have the defaults"
    return f"given {given(node, value)}; must be {describe(shape)}" + (f"; {hint}" if hint else "")


def _own_words(item: Any, path: tuple[Key, ...], tree: Tree, cls: Model) -> tuple[tuple[Key, ...], str]:
    """The message of a validator, at the first key that it names and that was written."""
    text = str(item.get("ctx", {}).get("error") or item["msg"].removeprefix("Value error, "))
    if not isinstance(item["input"], dict):
        return path, text
    names = re.findall(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*", text)
    # A dotted name is surely meant, one with an underscore probably; a plain word may only be a word.
    for name in sorted(names, key=lambda name: 0 if "." in name else 1 if "_" in name else 2):
        keys: list[Key] = [int(part) if part.isdigit() else part for part in name.split(".")]
        for candidate in ((*path, *keys), tuple(keys)):
            if ("." in name or candidate[:-1] == path) and candidate != path and tree.find(candidate) is not None:
                return candidate, text
    return path, text
