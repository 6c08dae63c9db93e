"""`fathom.load` and `fathom.train` are functions to the user and modules to Python, in whatever order they are met."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAKE = """
import sys, types
import fathom
sys.modules["fathom.pretrain"] = types.SimpleNamespace(train=lambda *a, **k: ("opened", a, k))
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_fathom_imports_nothing() -> None:
    heavy = "torch numpy pydantic yaml typer rich tokenizers"
    assert python(f"import sys, fathom; print([m for m in {heavy.split()} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "before", ["", "import fathom.train.state", "from fathom.train import state", "import fathom.train"]
)
def test_train_is_called_and_still_a_package(before: str) -> None:
    after = "import fathom.train.state as s\nprint(s.__name__, fathom.train.state is s)"
    code = f"{FAKE}\n{before}\nprint(fathom.train('a', x=1))\n{after}"
    assert python(code).splitlines() == ["('opened', ('a',), {'x': 1})", "fathom.train.state True"]


@pytest.mark.parametrize("before", ["", "from fathom.load import load", "import fathom.load"])
def test_load_is_called(before: str) -> None:
    code = (
        f"import fathom\n{before}\nfrom fathom.errors import UserError\n"
        "try:\n    fathom.load('no/such/run')\nexcept UserError as error:\n    print(type(error).__name__)"
    )
    assert python(code) == "CheckpointError"


def test_there_are_no_other_doors() -> None:
    import fathom

    with pytest.raises(AttributeError, match=r"fathom\.load and fathom\.train"):
        fathom.nothing  # noqa: B018
