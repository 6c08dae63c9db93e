"""Configuration files and what is laid over them:      `base:` < the file < `section.key=value`

Two mappings merge key by key; anything else replaces what it is laid over. One exception: a mapping whose `kind`
differs from the one below replaces it whole, since the keys of one kind mean nothing to another. All overrides of one
call are one layer, so `model.attention.kind=mla model.attention.kv_lora_rank=64` builds the new attention from nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.config.text import Key, Node, Place, compose, lay
from fathom.errors import ConfigError

Overrides = Sequence[str] | Mapping[str, Any]
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Tree:
    """What was written, all layers laid over each other, with the place of every key."""

    root: Node
    source: str

    def plain(self) -> dict[str, Any]:
        """The tree as plain dicts, lists and scalars."""
        return self.root.plain()

    def find(self, path: Sequence[Key]) -> Node | None:
        """The node at a path, or None."""
        node: Node | None = self.root
        for key in path:
            node = child(node, key)
            if node is None:
                return None
        return node

    def place(self, path: Sequence[Key]) -> Place:
        """Where the key at a path was written; of a key that was not written, where its section was."""
        for end in range(len(path), 0, -1):
            node = self.find(path[:end])
            if node is not None:
                return node.place
        return Place(self.source)


def child(node: Node | None, key: Key) -> Node | None:
    """The node under a key or an index, or None."""
    if node is None:
        return None
    if isinstance(node.value, dict):
        return node.value.get(key)
    if isinstance(node.value, list) and isinstance(key, int) and 0 <= key < len(node.value):
        return node.value[key]
    return None


def read(path: str | Path, overrides: Overrides = ()) -> Tree:
    """A YAML file with its bases and overrides.

    overrides: `section.key=value` texts, the values in YAML (`a.b=[1, 2]`; `data.datasets.0.path=x` for a list), or
    a mapping from dotted key to value, taken as it is. Names are not checked here: `parse` knows which there are.

    ConfigError: a file that is missing, empty, not text or not YAML; a base that leads back to itself; an override that
    is not key=value.
    """
    root = _read(Path(path), ())
    patch = overlay(overrides)
    if patch is not None:
        root = merge(root, patch, ())
    return Tree(root, str(path))


def merge(below: Node | None, above: Node, path: tuple[Key, ...]) -> Node:
    """Lay one node over another."""
    if not isinstance(above.value, dict):
        return above
    indexed = bool(above.value) and all(isinstance(key, int) for key in above.value)
    if indexed and not (below is not None and isinstance(below.value, dict)):
        return _merge_items(below, above, path)
    under = below.value if below is not None and isinstance(below.value, dict) else {}
    if indexed:  # the numbers are names after all
        above = Node({str(key): node for key, node in above.value.items()}, above.place)
    kind = child(above, "kind")
    if kind is not None and "kind" in under and kind.value != under["kind"].value:
        under = {}
    merged = dict(under)
    for key, node in above.value.items():
        merged[key] = merge(under.get(key), node, (*path, key))
    # A section keeps the place where it was first opened; each of its keys knows its own.
    return Node(merged, below.place if under and below is not None else above.place)


def _merge_items(below: Node | None, above: Node, path: tuple[Key, ...]) -> Node:
    items = list(below.value) if below is not None and isinstance(below.value, list) else []
    for index in sorted(above.value):
        node = above.value[index]
        if index > len(items):
            name = dotted(path)
            count = f"{len(items)} item{'' if len(items) == 1 else 's'}"
            raise ConfigError(
                f"{node.place}: {dotted((*path, index))}: {name} has {count}, counted from 0; "
                f"the next one to add is {name}.{len(items)}"
            )
        new = merge(items[index] if index < len(items) else None, node, (*path, index))
        items[index : index + 1] = [new]
    return Node(items, below.place if below is not None else above.place)


def dotted(path: Sequence[Key]) -> str:
    """A path as users type it: data.datasets.0.path."""
    return ".".join(str(key) for key in path)


# --- files ------------------------------------------------------------


def _read(path: Path, chain: tuple[Path, ...]) -> Node:
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(shown.name for shown in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: `base:` leads back to itself ({circle}); take one of them out")
    root = compose(_text(path), str(path))
    if root is None:
        raise ConfigError(
            f"{path} holds no settings; it must have sections, such as `model:` (see configs/ for examples)"
        )
    if not isinstance(root.value, dict):
        what = "a list" if isinstance(root.value, list) else f"only the text {str(root.value)[:40]!r}"
        raise ConfigError(f"{root.place}: a configuration has sections, such as `model:`; this file holds {what}")
    base = root.value.get("base")
    if base is None and "base" not in root.value:
        return root
    own = Node({key: node for key, node in root.value.items() if key != "base"}, root.place)
    if base is None or not isinstance(base.value, str):
        raise ConfigError(f"{root.value['base'].place}: base: must name one YAML file, relative to this one")
    below = path.parent / base.value
    if not below.is_file():
        raise ConfigError(f"{base.place}: base: {_missing(below)} (`base` is relative to the file that names it)")
    return merge(_read(below, (*chain, resolved)), own, ())


def _text(path: Path) -> str:
    if path.is_dir():
        inside = sorted(found.name for found in path.glob("*.yaml"))
        raise ConfigError(
            f"{path} is a folder, not a YAML file" + (f"; it holds {', '.join(inside)}" if inside else "")
        )
    if not path.exists():
        raise ConfigError(_missing(path))
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: this is not UTF-8 text; is it a YAML file, saved as UTF-8?") from None
    if "\0" in text:
        raise ConfigError(f"{path} is a binary file, not YAML")
    return text


def _missing(path: Path) -> str:
    """'x is not there', with names like it."""
    folders = [path.parent, path.parent / "configs", path.parent.parent / "configs"]
    found = {
        file.stem: file
        for folder in reversed(folders)
        for pattern in ("*.yaml", "*.yml")
        if folder.is_dir()
        for file in sorted(folder.glob(pattern))
    }
    near = [str(found[name]) for name in difflib.get_close_matches(path.stem, list(found), n=1, cutoff=0.6)]
    hint = (
        f"; did you mean {near[0]}?" if near else f"; there are {', '.join(map(str, found.values()))}" if found else ""
    )
    return f"{path} is not there" + hint


# --- overrides ------------------------------------------------------------


def overlay(overrides: Overrides) -> Node | None:
    """All overrides as one tree to lay over the file, or None without any. Later ones win."""
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        pairs = [(key, lay(value, Place("overrides"))) for key, value in overrides.items()]
    else:
        pairs = [_pair(text) for text in overrides]
    root: Node | None = None
    for name, node in pairs:
        root = _graft(root, _keys(name, node.place), node, ())
    return root


def _graft(below: Node | None, keys: Sequence[Key], node: Node, path: tuple[Key, ...]) -> Node:
    """Put a value at its path. Numbers stay numbers until it is known whether a list is below."""
    if not keys:
        return node if below is None else merge(below, node, path)
    key, rest = keys[0], keys[1:]
    if below is not None and isinstance(below.value, list) and isinstance(key, int):
        patch = _graft(None, keys, node, path)
        return merge(below, patch, path)
    here = dict(below.value) if below is not None and isinstance(below.value, dict) else {}
    here[key] = _graft(here.get(key), rest, node, (*path, key))
    return Node(here, node.place if below is None else below.place)


def _keys(name: str, place: Place) -> list[Key]:
    parts = name.split(".")
    if not all(part.strip() == part and part for part in parts):
        raise ConfigError(
            f"{place}: '{name}' is not a key; write section.key=value, for instance training.max_steps=100"
        )
    if parts[0] == "base":
        raise ConfigError(f"{place}: base cannot be overridden; it belongs into the file")
    return [int(part) if part.isascii() and part.isdigit() else part for part in parts]


def _pair(text: str) -> tuple[str, Node]:
    place = Place(COMMAND_LINE)
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(
            f"{place}: '{text}' is not an override; write section.key=value without spaces, "
            "for instance training.max_steps=100"
        )
    name = name.removeprefix("--").strip()
    if not value.strip():
        raise ConfigError(
            f"{place}: '{text}' gives {name} no value; write {name}=null for none, or {name}='\"\"' for an empty text"
        )
    try:
        node = compose(value, COMMAND_LINE, lines=False)
    except ConfigError as error:
        said = str(error).removeprefix(f"{place}: ")
        raise ConfigError(
            f"{place}: {name}: {said}\n      (quote a text that YAML reads otherwise: {name}='\"...\"')"
        ) from None
    return name, node if node is not None else Node(None, place)
