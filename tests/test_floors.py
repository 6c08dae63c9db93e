"""The house stands: a file imports only from floors below its own, rooms on one floor do not know each other, and
inside a room imports run one way. Imports inside functions count, and so do the modules that cli/main.py names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "fathom"
GROUND = {"errors", "knobs", "log", "batch", "version", "places"}
FLOORS = [
    GROUND | {"client"},
    {"model", "tokenizer", "config", "runtime", "optim", "report"},
    {"data", "distributed", "generate", "hub", "train"},
    {"recipe"},
    {"load", "serve", "evaluate"},
    {"pretrain"},
    {"study", "verify", "bench"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}
ROOFS = {"client", "report", "serve", "study", "verify", "bench"}  # can be deleted: only commands and floor 7 know them
MODULE = r"fathom(\.[a-z_]+)+"
OUTSIDE = {"__init__", "__main__"}  # the doors of the house itself


def files(house: Path) -> dict[str, Path]:
    """Module name (model.moe.layer) -> file."""
    found = {}
    for path in sorted(house.rglob("*.py")):
        parts = path.relative_to(house).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module below fathom, line) of every import, also of import_module("fathom...") and of the table of commands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fathom":
                    yield alias.name.partition(".")[2], node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the whole name"
            if node.module == "fathom":
                for alias in node.names:
                    yield alias.name, node.lineno
            elif node.module and node.module.startswith("fathom."):
                module = node.module.partition(".")[2]
                for alias in node.names:
                    yield f"{module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Constant) and path.parent.name == "cli" and re.fullmatch(MODULE, str(node.value)):
            yield node.value.partition(".")[2], node.lineno


def wrong_arrows(house: Path) -> list[str]:
    """Every import that the house forbids, in words."""
    wrong = []
    for module, path in files(house).items():
        room = module.split(".")[0]
        if room in OUTSIDE:
            continue
        if room not in FLOOR:
            wrong.append(f"{path}: no floor is known for {room}")
            continue
        for target, line in imports(path):
            other = target.split(".")[0]
            where = f"{path.relative_to(house)}:{line}: {room} imports {other}"
            if other == room or other in GROUND or other.startswith("__"):
                continue
            if other not in FLOOR:
                wrong.append(f"{where}, which no floor has")
            elif FLOOR[other] > FLOOR[room]:
                wrong.append(f"{where}: the arrow runs up")
            elif FLOOR[other] == FLOOR[room]:
                wrong.append(f"{where}: the arrow runs sideways")
            elif other in ROOFS and FLOOR[room] < FLOOR["study"]:
                wrong.append(f"{where}, which must be deletable")
    return wrong


def circles(house: Path) -> list[str]:
    """Every circle of imports between the files of a room."""
    known = files(house)
    arrows: dict[str, set[str]] = {}
    for module, path in known.items():
        targets = {target if target in known else target.rpartition(".")[0] for target, _ in imports(path)}
        arrows[module] = {target for target in targets if target in known and target != module}
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            found.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for target in sorted(arrows[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in arrows:
        visit(module, ())
    return found


def test_no_arrow_runs_up_or_sideways() -> None:
    assert wrong_arrows(HOUSE) == []


def test_files_of_a_room_import_each_other_one_way() -> None:
    assert circles(HOUSE) == []


def test_every_command_of_the_table_is_there() -> None:
    from fathom.cli.main import COMMANDS

    for name, (module, attribute, line) in COMMANDS.items():
        path = HOUSE.parent / (module.replace(".", "/") + ".py")
        assert path.is_file(), f"fathom {name}: {module} is not there"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        names |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        assert attribute in names, f"fathom {name}: {module} has no {attribute}"
        assert len(line) < 80


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("model/a.py", "from fathom.train.trainer import Trainer", "up"),
        ("model/a.py", "import fathom.optim.muon", "sideways"),
        ("model/a.py", "def f():\n    from fathom import recipe", "up"),
        ("train/a.py", "from fathom.data import loader", "sideways"),
        ("evaluate/a.py", "from fathom.load import load", "sideways"),
        ("pretrain.py", "from fathom.report.html import write", "deletable"),
        ("train/a.py", "from fathom.model.nothing import x", None),
        ("load.py", "from fathom.recipe import RunConfig\nfrom fathom.errors import UserError", None),
        ("cli/a.py", "from fathom.report.html import write", None),
        ("new/a.py", "import torch", "no floor"),
        ("train/a.py", "from fathom.new import x", "no floor"),
    ],
)
def test_the_test_sees_what_it_looks_for(tmp_path: Path, file: str, text: str, words: str | None) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    found = wrong_arrows(tmp_path)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_the_test_sees_circles(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.py").write_text("from fathom.model.b import x")
    (tmp_path / "model/b.py").write_text("def f():\n    from fathom.model import a")
    assert circles(tmp_path) == ["model.a -> model.b -> model.a"]
