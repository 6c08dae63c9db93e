"""What pyproject.toml asks for, as a requirements file on stdout: `python requirements.py --base --extra serve`.

--base [NAME ...]   the project's own dependencies, or those of them that are named
--extra NAME        one of its extras
--pin NAME          the version of a package that constraints.txt holds
So the images install packages before they know the source, and again only when these files change.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "pyproject.toml").exists() else HERE.parent


def name_of(requirement: str) -> str:
    """torch>=2.11 -> torch."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def pinned(name: str) -> str:
    """torch -> torch==2.13.0."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].split(";")[0].strip()
        if requirement.startswith(f"{name}=="):
            return requirement
    sys.exit(f"constraints.txt has no {name}")


def main() -> None:
    """Read the options, print the requirements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", nargs="*")
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("--pin", action="append", default=[])
    asked = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [pinned(name) for name in asked.pin]
    if asked.base is not None:
        base = {name_of(requirement): requirement for requirement in project["dependencies"]}
        unknown = set(asked.base) - set(base)
        if unknown:
            sys.exit(f"pyproject.toml has no dependency {', '.join(sorted(unknown))}")
        found += [base[name] for name in asked.base] if asked.base else list(base.values())
    for extra in asked.extra:
        found += project["optional-dependencies"][extra]
    print("\n".join(found))


if __name__ == "__main__":
    main()
