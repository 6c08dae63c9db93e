"""Contestants of a few lines that need nothing but Python: their processes start in a tenth of a second."""

from __future__ import annotations

from pathlib import Path

from fathom.bench.machine import Surroundings
from fathom.bench.pipe import Child

PEER = """
import os, sys, time
PACKAGES = ("no-such-package", "pip")

class Echo:
    def __init__(self, job):
        self.job, self.setting, self.chose = job, {"speed": 1, **job.get("kept", {})}, False
        print("this goes to stderr")

    def say(self, text):
        print("so does this")
        with open(self.job["log"], "a") as file:
            file.write(text)
        return {"said": text, "threads": os.environ["OMP_NUM_THREADS"]}

    def fail(self):
        raise ValueError("of this size I have nothing")

    def die(self):
        print("GGML_ASSERT: no", file=sys.stderr)
        os._exit(3)

    def sleep(self):
        time.sleep(60)

    def grow(self):
        self.held = bytearray(50_000_000)
        for i in range(0, len(self.held), 4096):
            self.held[i] = 1
        return len(self.held)

    def shrink(self):
        self.held = None

    def chosen_here(self):
        return self.chose

    def choose(self):
        self.chose = True
        return {"kept": {"speed": 2}, "tried": {"slow": 0.5, "fast": 0.25}}
"""


def peer(folder: Path, text: str = PEER) -> Path:
    """The file of a peer."""
    path = folder / "peer.py"
    path.write_text(text)
    return path


class Small(Surroundings):
    """Surroundings in which every contestant is the peer of this file."""

    def child(self, peer: str, python: str, **extra: str) -> Child:
        return Child(Path(peer), python, threads=self.threads, extra=extra, limit=self.limit)
