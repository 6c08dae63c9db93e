"""YAML text <-> nodes that remember their lines.

YAML as a person means it: `1e-3` is a number (YAML 1.1 makes it text), `010` is ten and `10:30` is text (1.1 makes them
eight and 630), dates are text, keys are names, a key stands once in a mapping.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from fathom.errors import ConfigError

Key = str | int


@dataclass(frozen=True)
class Place:
    """Where something was written: a file and its line (from 1), or a source without lines, as the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A value with its place. `value` is a scalar, a list of nodes, or a mapping from key to node; `written` is the
    source text of a plain scalar, for messages (`no` reads better than `False`)."""

    value: Any
    place: Place
    written: str | None = None

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def lay(value: Any, place: Place) -> Node:
    """A plain value (mappings, lists, tuples, scalars; anything else by its text) as nodes that share one place."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return Node({str(key): lay(item, place) for key, item in value.items()}, place)
    if isinstance(value, list | tuple):
        return Node([lay(item, place) for item in value], place)
    if value is None or isinstance(value, bool | int | float | str):
        return Node(value, place)
    return Node(str(value), place)


INT = re.compile(r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$")
FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
OTHERS = ("bool", "null", "merge")  # of YAML 1.1's resolvers these stay


def _resolvers(base: dict[Any, Any]) -> dict[Any, Any]:
    kept = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rsplit(":", 1)[-1] in OTHERS]
        for first, pairs in base.items()
    }
    for first in "-+0123456789.":
        number = [("tag:yaml.org,2002:int", INT), ("tag:yaml.org,2002:float", FLOAT)]
        kept[first] = number + kept.get(first, [])
    return kept


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers above."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader.yaml_implicit_resolvers)

    def number(self, node: yaml.ScalarNode) -> int:
        """A whole number: decimal, or with 0x, 0o, 0b."""
        text = str(node.value).replace("_", "")
        return int(text, 0) if text.lstrip("+-")[:2] in ("0x", "0o", "0b") else int(text)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.number)


class Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for something else; short lists stand on one line."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal parts out in full."""
        return True

    def short_list(self, data: list[Any]) -> yaml.Node:
        """A list of scalars in brackets, anything else item by item."""
        nested = any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=not nested)

    def text(self, data: str) -> yaml.Node:
        """Unicode's own line breaks are escaped: a YAML reader would turn them into spaces."""
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


Dumper.add_representer(str, Dumper.text)
Dumper.add_representer(list, Dumper.short_list)


def dump(config: BaseModel | Mapping[str, Any]) -> str:
    """The YAML text of a configuration, every knob written out; reading it gives an equal configuration."""
    data = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def compose(text: str, source: str, lines: bool = True) -> Node | None:
    """YAML text -> nodes; None for an empty text. `lines=False` where a line number would mean nothing.

    ConfigError: not YAML, more than one document, a key that stands twice or is no name, a tag like !!python.
    """
    try:
        loader = Loader(text)
        try:
            root = loader.get_single_node()
            return None if root is None else _Composer(loader, source, lines).node(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(_unreadable(error, text, source, lines)) from None


class _Composer:
    def __init__(self, loader: Loader, source: str, lines: bool) -> None:
        self.loader, self.source, self.lines = loader, source, lines
        self.open: list[yaml.Node] = []

    def place(self, node: yaml.Node) -> Place:
        return Place(self.source, node.start_mark.line + 1 if self.lines else None)

    def node(self, node: yaml.Node, place: Place | None = None) -> Node:
        place = place or self.place(node)
        if any(node is outer for outer in self.open):
            raise ConfigError(f"{place}: an anchor (&name) that holds itself (*name); write the value out")
        self.open.append(node)
        try:
            if isinstance(node, yaml.CollectionNode) and node.tag.rsplit(":", 1)[-1] not in ("map", "seq"):
                raise ConfigError(f"{place}: tags ({node.tag}) are not read; write the plain value")
            if isinstance(node, yaml.MappingNode):
                return Node(self.mapping(node), place)
            if isinstance(node, yaml.SequenceNode):
                return Node([self.node(item) for item in node.value], place)
            try:
                value = self.loader.construct_object(node)
            except ValueError as error:  # for instance !!int abc
                raise ConfigError(f"{place}: {node.value!r}: {error}") from None
            if not (value is None or isinstance(value, bool | int | float | str)):
                raise ConfigError(f"{place}: tags ({node.tag}) are not read; write the plain value")
            plain = isinstance(node, yaml.ScalarNode) and node.style is None
            return Node(value, place, str(node.value) if plain else None)
        finally:
            self.open.pop()

    def mapping(self, node: yaml.MappingNode) -> dict[Key, Node]:
        seen: dict[str, Place] = {}
        for key, _ in node.value:
            place, name = self.place(key), key.value
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key must be a name, here it is a list or a mapping; is a quote missing?")
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if name in seen:
                first = f"line {seen[name].line}" if self.lines else "before"
                raise ConfigError(f"{place}: the key '{name}' stands twice (first: {first}); keep one of the two")
            seen[name] = place
        self.loader.flatten_mapping(node)  # `<<: *anchor`: what is written beside it wins
        return {str(key.value): self.node(value, self.place(key)) for key, value in node.value}


CRAMPED = re.compile(r"\s*[A-Za-z_][A-Za-z0-9_]*:[^\s:/\\]")  # key:value

HINTS = (  # what PyYAML says, what it mostly means
    ("'\\t'", "YAML is indented with spaces; replace the tab"),
    ("mapping values are not allowed", "is the indentation right, and text that holds ': ' in quotes?"),
    ("could not find expected ':'", "a key is written `key: value`, with a space after the colon"),
    ("expected <block end>", "lines of one section start in the same column; is the indentation right?"),
    ("sequence entries are not allowed", "items of a list stand on their own lines, or in brackets: [a, b]"),
    ("expected ',' or '}'", "a { is not closed, or a comma is missing"),
    ("expected ',' or ']'", "a [ is not closed, or a comma is missing"),
    ("unexpected end of stream", "a quote is not closed"),
    ("expected a single document", "the file has a second document after `---`; keep one"),
    ("found undefined alias", "text that starts with * stands in quotes"),
    ("special characters are not allowed", "the file holds bytes that are not text"),
    ("could not determine a constructor", "tags (!name) are not read; write the plain value"),
    ("cannot start any token", "text that starts with @, `, % or a quote stands in quotes"),
)


def _unreadable(error: yaml.YAMLError, text: str, source: str, lines: bool) -> str:
    problem, context = str(getattr(error, "problem", None) or error), getattr(error, "context", None) or ""
    said = f"{context} {problem}" if problem.startswith("but ") else problem.splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    if mark is None or "flow" in context or "quoted" in context:
        mark = getattr(error, "context_mark", None) or mark  # where a bracket or quote was opened
    hint = next((advice for words, advice in HINTS if words in said or words in str(error)), None)
    if mark is None or not lines:
        return f"{Place(source)}: this is not YAML: {said}" + (f"; {hint}" if hint else "")
    rows, row = text.splitlines(), mark.line
    above = next((i for i in range(row, max(row - 2, -1), -1) if i < len(rows) and CRAMPED.match(rows[i])), None)
    if above is not None:
        row, hint = above, "put a space after the colon"
    shown = f"\n      {rows[row].strip()[:100]}" if row < len(rows) and rows[row].strip() else ""
    return f"{Place(source, row + 1)}: this is not YAML: {said}" + (f"; {hint}" if hint else "") + shown
