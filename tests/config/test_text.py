"""YAML text and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.config.text import compose, dump
from fathom.errors import ConfigError


def value(text: str) -> object:
    node = compose(f"a: {text}\n", "x.yaml")
    assert node is not None
    return node.plain()["a"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("1.0e-3", 1e-3), ("-.5", -0.5), ("3.", 3.0), ("10_000", 10000), ("010", 10),
        ("0x10", 16), ("0o17", 15), ("+7", 7), ("-7", -7), ("10:30", "10:30"), ("2026-01-02", "2026-01-02"),
        ("1e", "1e"), ("e5", "e5"), ("1.2.3", "1.2.3"), ("'1'", "1"), ("true", True), ("off", False), ("null", None),
        ("~", None), ("", None), (".inf", float("inf")), ("C:\\runs", "C:\\runs"), ("1_0.5", 10.5), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_are_what_a_person_means(text: str, wanted: object) -> None:
    found = value(text)
    assert found == wanted
    assert type(found) is type(wanted)


def test_every_key_knows_its_line() -> None:
    root = compose("a: 1\n\nb:\n  c:\n  - 2\n  - {d: 3}\n", "x.yaml")
    assert root is not None
    assert str(root.value["b"].place) == "x.yaml:3"
    assert str(root.value["b"].value["c"].place) == "x.yaml:4"
    assert str(root.value["b"].value["c"].value[1].value["d"].place) == "x.yaml:6"


def test_anchors_and_merge_keys() -> None:
    root = compose("a: &one {x: 1, y: 2}\nb: {<<: *one, y: 3}\n", "x.yaml")
    assert root is not None
    assert root.plain()["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", ["x.yaml:2", "'a' stands twice", "line 1"]),
        ("a:\n\tb: 1\n", ["x.yaml:2", "spaces", "tab"]),
        ("a:\n  b:3\n  c: 4\n", ["x.yaml:2", "space after the colon", "b:3"]),
        ("a: [1, 2\nb: 3\n", ["x.yaml:1", "[ is not closed"]),
        ("a: 'b\nc: 3\n", ["x.yaml:1", "quote is not closed"]),
        ("a: {b: 1\n", ["x.yaml:1", "{ is not closed"]),
        ("a: - 1\n", ["x.yaml:1", "[a, b]"]),
        ("a: what: this\n", ["x.yaml:1", "quotes"]),
        ("a:\n  b: 1\n c: 2\n", ["x.yaml:3", "same column"]),
        ("a: 1\n---\nb: 1\n", ["second document"]),
        ("a: *b\n", ["x.yaml:1", "quotes"]),
        ("a: &b [*b]\n", ["holds itself"]),
        ("a: !!python/object:os.system {}\n", ["x.yaml:1", "tags"]),
        ("a: !!binary aGk=\n", ["x.yaml:1", "tags"]),
        ("a: !mine 3\n", ["tags"]),
        ("a: !!int b\n", ["x.yaml:1"]),
        ("[1, 2]: 3\n", ["x.yaml:1", "key must be a name"]),
        ("a: @b\n", ["x.yaml:1", "quotes"]),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line_and_a_way_out(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(text, "x.yaml")
    for word in words:
        assert word in str(caught.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(), TREES, min_size=1, max_size=4))
def test_what_is_dumped_reads_back(data: dict[str, object]) -> None:
    root = compose(dump(data), "x.yaml")
    assert root is not None
    assert root.plain() == data


@given(
    st.from_regex(
        r"[-+]?[0-9._]{0,4}(e[-+]?[0-9]{1,2})?|true|no|null|~|=|<<|[0-9]{4}-[0-9]{2}-[0-9]{2}", fullmatch=True
    )
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    root = compose(dump({"a": text, text: 1}), "x.yaml")
    assert root is not None
    assert root.plain() == {"a": text, text: 1} if text != "a" else True
