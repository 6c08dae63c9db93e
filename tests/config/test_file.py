"""Files, bases and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.config.file import read
from fathom.errors import ConfigError


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def test_precedence_is_base_then_file_then_overrides(tmp_path: Path) -> None:
    write(tmp_path, a="m: {x: 1, y: 1, z: 1}\n", b="base: a.yaml\nm: {y: 2, z: 2}\n", c="base: b.yaml\n")
    assert read(tmp_path / "c.yaml", ["m.z=3"]).plain() == {"m": {"x": 1, "y": 2, "z": 3}}


def test_base_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, a="m: 1\n")
    write(tmp_path / "sub", b="base: ../a.yaml\nn: 2\n")
    tree = read(tmp_path / "sub" / "b.yaml")
    assert tree.plain() == {"m": 1, "n": 2}
    assert str(tree.place(("m",))).endswith("a.yaml:1")
    assert str(tree.place(("n",))).endswith("b.yaml:2")


def test_another_kind_replaces_and_the_same_kind_merges(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="s: {kind: p, x: 1}\n",
        b="base: a.yaml\ns: {kind: q, y: 1}\n",
        c="base: a.yaml\ns: {kind: p, y: 1}\n",
    )
    assert read(tmp_path / "b.yaml").plain() == {"s": {"kind": "q", "y": 1}}
    assert read(tmp_path / "c.yaml").plain() == {"s": {"kind": "p", "x": 1, "y": 1}}


@pytest.mark.parametrize("order", [1, -1])
def test_overrides_of_a_new_kind_lay_over_nothing_in_any_order(tmp_path: Path, order: int) -> None:
    write(tmp_path, a="s: {kind: p, x: 1}\n")
    overrides = ["s.kind=q", "s.y=2"][::order]
    assert read(tmp_path / "a.yaml", overrides).plain() == {"s": {"kind": "q", "y": 2}}
    assert read(tmp_path / "a.yaml", ["s.y=2"]).plain() == {"s": {"kind": "p", "x": 1, "y": 2}}


def test_null_and_lists_replace(tmp_path: Path) -> None:
    write(tmp_path, a="s: {x: 1}\nl: [1, 2, 3]\n", b="base: a.yaml\ns: null\nl: [4]\n")
    assert read(tmp_path / "b.yaml").plain() == {"s": None, "l": [4]}
    assert read(tmp_path / "b.yaml", ["s.x=5"]).plain() == {"s": {"x": 5}, "l": [4]}


def test_override_values_are_yaml(tmp_path: Path) -> None:
    write(tmp_path, a="m: {}\n")
    overrides = ["m.a=1e-3", "m.b=[1, x]", "m.c={d: 2}", "m.e=null", "m.f='1'", "m.g=a b=c", 'm.h=""', "--m.i=1"]
    wanted = {"a": 1e-3, "b": [1, "x"], "c": {"d": 2}, "e": None, "f": "1", "g": "a b=c", "h": "", "i": 1}
    assert read(tmp_path / "a.yaml", overrides).plain() == {"m": wanted}


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    write(tmp_path, a="l: [{kind: p, x: 1}, {kind: p, x: 2}]\nn: {'0': a}\n")
    path = tmp_path / "a.yaml"
    assert read(path, ["l.1.x=3"]).plain()["l"] == [{"kind": "p", "x": 1}, {"kind": "p", "x": 3}]
    assert read(path, ["l.0.kind=q", "l.0.y=4"]).plain()["l"][0] == {"kind": "q", "y": 4}
    assert read(path, ["l.2={kind: r}", "l.2.z=1"]).plain()["l"][2] == {"kind": "r", "z": 1}
    assert read(path, ["l=[5]", "l.1=6"]).plain()["l"] == [5, 6]
    assert read(path, ["new.0=a", "new.1=b"]).plain()["new"] == ["a", "b"]
    assert read(path, ["n.0=b"]).plain()["n"] == {"0": "b"}


def test_a_mapping_of_overrides_is_taken_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, a="m: {x: 1}\n")
    tree = read(tmp_path / "a.yaml", {"m.x": "1e-3", "m.y": (1, 2), "m.z": Path("a/b"), "m.w": {"v": None}})
    assert tree.plain() == {"m": {"x": "1e-3", "y": [1, 2], "z": str(Path("a/b")), "w": {"v": None}}}


def test_the_last_of_two_overrides_counts(tmp_path: Path) -> None:
    write(tmp_path, a="m: {x: 1}\n")
    assert read(tmp_path / "a.yaml", ["m.x=2", "m.x=3"]).plain() == {"m": {"x": 3}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["m"], ["'m' is not an override", "section.key=value"]),
        (["m.x="], ["no value", "m.x=null"]),
        (["=3"], ["is not a key"]),
        (["m..x=3"], ["is not a key"]),
        (["m x=3"], ["m x"]),
        (["m.x=[1"], ["m.x", "not YAML"]),
        (["m.x=a: b: c"], ["m.x", "quote"]),
        (["l.3.x=1"], ["l.3", "2 items", "l.2"]),
        (["base=b.yaml"], ["base cannot be overridden"]),
    ],
)
def test_bad_overrides(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    write(tmp_path, a="m: {x: 1}\nl: [1, 2]\n")
    if "m x=3" in overrides:  # an odd name is a matter for parse, which knows the right ones
        assert read(tmp_path / "a.yaml", overrides).plain()["m x"] == 3
        return
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "a.yaml", overrides)
    assert "command line" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["holds no settings"]),
        ("# only this\n", ["holds no settings"]),
        ("- a\n", ["x.yaml:1", "a list"]),
        ("hello\n", ["x.yaml:1", "hello"]),
        ("m: 1\nbase: there.yaml\n", ["x.yaml:2", "there.yaml is not there"]),
        ("base: x.yaml\n", ["leads back to itself", "x.yaml -> x.yaml"]),
        ("base: y.yaml\n", ["leads back to itself", "y.yaml -> x.yaml"]),
        ("base:\n", ["x.yaml:1", "one YAML file"]),
        ("base: [y.yaml]\n", ["x.yaml:1", "one YAML file"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: list[str]) -> None:
    write(tmp_path, x=text, y="base: x.yaml\n")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "x.yaml")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"a: \xff\xfe", ["x.yaml:1", "UTF-8"]), (b"a: 1\nb: \xe9\n", ["x.yaml:2", "UTF-8"]), (b"a: \0\0", ["binary"])],
)
def test_files_that_are_not_text(tmp_path: Path, raw: bytes, words: list[str]) -> None:
    (tmp_path / "x.yaml").write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "x.yaml")
    for word in words:
        assert word in str(caught.value)


def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa:\r\n  b: 1\r\n")
    assert read(tmp_path / "x.yaml").plain() == {"a": {"b": 1}}


def test_missing_files_are_told_with_names_like_them(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs", laptop="a: 1\n", tiny="a: 1\n")
    for name in ("laptop.yaml", "configs/latpop.yaml", "laptop"):
        with pytest.raises(ConfigError, match=r"did you mean .*configs.laptop\.yaml"):
            read(tmp_path / name)
    with pytest.raises(ConfigError, match="is a folder"):
        read(tmp_path / "configs")
