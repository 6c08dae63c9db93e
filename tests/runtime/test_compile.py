"""The switch of torch.compile: refused before the first step where it cannot work."""

from __future__ import annotations

import shutil

import pytest
import torch

from fathom.errors import DependencyError
from fathom.runtime.compile import compiled


def test_no_compiler_no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DependencyError, match="compile: false"):
        compiled(torch.sin, torch.device("cpu"))


def test_a_compiler_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: seen.append(how) or function)
    assert compiled(torch.sin, torch.device("cpu")) is torch.sin
    assert seen == [{"dynamic": False}]
