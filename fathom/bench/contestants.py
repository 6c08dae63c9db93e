"""Who takes part: the table of contestants, and who of them was asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fathom.errors import ConfigError

BENCH = 'pip install "fathom-lm[bench]"'
WEIGHTS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Contestant:
    """A name, and the module that it is imported by (None: our own).

    trains, decodes  the file of `peers/` with its Trainer, its Decoder
    weights          those it decodes with
    gguf             it reads GGUF files; others read Hugging Face folders
    cuda             it can be benched on a GPU
    torch            its products are torch's own
    other            it has another model than ours, so that only speeds compare
    install          how to get it
    """

    name: str
    module: str | None
    trains: str | None = None
    decodes: str | None = None
    weights: tuple[str, ...] = ()
    gguf: bool = False
    cuda: bool = False
    torch: bool = False
    other: bool = False
    install: str = BENCH


OURS = Contestant("fathom", None, trains="ours_training", decodes="ours_decoding", weights=WEIGHTS, cuda=True)
PEERS = {
    peer.name: peer
    for peer in (
        Contestant(
            "transformers", "transformers", trains="in_transformers", decodes="in_transformers",
            weights=("float32", "bfloat16"), cuda=True, torch=True,
        ),
        Contestant("llama.cpp", "xllamacpp", decodes="in_llama_cpp", weights=WEIGHTS, gguf=True),
        Contestant("mlx-lm", "mlx_lm", decodes="in_mlx", weights=("float32",)),
        Contestant(
            "vllm", "vllm", decodes="in_vllm", weights=("float32", "bfloat16"),
            install="it pins other versions, so give it an environment of its own (docs/checkpoints.md) and then "
            "--peers vllm=PYTHON",
        ),
        Contestant(
            "litgpt", "litgpt", trains="in_litgpt", torch=True, other=True,
            install="pip install litgpt, in an environment of its own, and then --peers litgpt=PYTHON",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A contestant that takes part, and the interpreter that has it."""

    contestant: Contestant
    python: str = sys.executable

    @property
    def name(self) -> str:
        """Of the contestant."""
        return self.contestant.name


def entries(words: Sequence[str], role: str) -> tuple[list[Entry], dict[str, str]]:
    """`NAME`, `NAME=PYTHON`, all, none, alone or with commas -> who plays the role (trains or decodes), in the order of
    the table, and who is left out and why. No words: all that are installed.

    ConfigError: no such peer or interpreter, or a peer asked for by name that does not play the role.
    """
    asked = [word for given in words for word in given.split(",") if word] or ["all"]
    found: dict[str, Entry] = {}
    for word in asked:
        name, _, python = word.partition("=")
        if word == "all":
            found = {**{n: Entry(p) for n, p in PEERS.items() if getattr(p, role)}, **found}
        elif word != "none":
            found[name] = Entry(_peer(name, role), _interpreter(word, python))
    ordered = [found[name] for name in PEERS if name in found]
    absent = [e for e in ordered if e.python == sys.executable and find_spec(str(e.contestant.module)) is None]
    left = {entry.name: f"not installed: {entry.contestant.install}" for entry in absent}
    return [entry for entry in ordered if entry not in absent], left


def _peer(name: str, role: str) -> Contestant:
    if name not in PEERS:
        raise ConfigError(f"there is no peer {name}; possible are all, none, {', '.join(PEERS)}")
    if not getattr(PEERS[name], role):
        able = [n for n, p in PEERS.items() if getattr(p, role)]
        raise ConfigError(f"{name} does not take part in this bench; possible are all, none, {', '.join(able)}")
    return PEERS[name]


def _interpreter(word: str, python: str) -> str:
    if "=" not in word:
        return sys.executable
    path = Path(os.path.expanduser(python))
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise ConfigError(f"--peers {word}: {path} is no interpreter; give the path of one, as .venv/bin/python")
    return str(path.absolute())
