"""Fathom: train, measure, export and serve DeepSeek-style language models.

    run = fathom.load("runs/demo")                                              # opens a run
    run = fathom.train("configs/laptop.yaml", {"training.max_steps": 50})       # makes one

Importing fathom imports nothing else; torch comes with the first call.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from fathom.version import __version__

DOORS = {"load": ("fathom.load", "load"), "train": ("fathom.pretrain", "train")}


class _Door(ModuleType):
    """A module that can be called. To the user, `fathom.load` and `fathom.train` are functions; to Python, which binds
    those names here as soon as anything below them is imported, they are a module and a room. So they are both."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        module, name = DOORS[self.__name__.rpartition(".")[2]]
        return getattr(import_module(module), name)(*arguments, **named)


class _House(ModuleType):
    """The package, which opens the two doors when Python binds them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DOORS and isinstance(value, ModuleType):
            value.__class__ = _Door
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in DOORS:
        return import_module(f"fathom.{name}")
    raise AttributeError(f"fathom has no {name!r}; its doors are fathom.load and fathom.train")


sys.modules[__name__].__class__ = _House

__all__ = ["__version__"]
