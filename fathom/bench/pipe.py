"""Our end of a contestant's process (`child.py` is the other)."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
PEERS = HERE / "peers"
GENTLE = 10.0  # seconds that a process has to leave by itself


class Absent(Exception):
    """The interpreter does not have what the contestant imports."""


class Failed(Exception):
    """The contestant did not do what was asked; the message is what it said."""


def environment(threads: int, preload: Path | None) -> dict[str, str]:
    """What every contestant gets: as many threads as the others, the same allocator, no network."""
    told = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if preload is not None:
        told["LD_PRELOAD"] = str(preload)
    return {**os.environ, **told}


def with_house(surroundings: Mapping[str, str]) -> dict[str, str]:
    """The same for an interpreter of ours, that it finds this Fathom and no other."""
    found = (str(HERE.parents[1]), surroundings.get("PYTHONPATH", ""))
    return {**surroundings, "PYTHONPATH": os.pathsep.join(filter(None, found))}


class Child:
    """A contestant's process; peer: its file. `with Child(...) as child: child.ask("open", role="Trainer", ...)`.

    Absent: a module is missing there. Failed: the process cannot be started, or says nothing within `limit` seconds.
    """

    def __init__(
        self,
        peer: Path,
        python: str = sys.executable,
        *,
        threads: int = 1,
        preload: Path | None = None,
        extra: Mapping[str, str] | None = None,
        limit: float = 300.0,
    ) -> None:
        surroundings = {**environment(threads, preload), **(extra or {})}
        if python == sys.executable:  # Fathom may be a source tree that is not installed
            surroundings |= with_house(surroundings)
        self._said: IO[str] = tempfile.TemporaryFile("a+", errors="replace")  # noqa: SIM115 - closed with the child
        try:
            self._process = subprocess.Popen(
                [python, str(HERE / "child.py"), str(peer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=surroundings,
            )
        except OSError as error:
            self._said.close()
            raise Failed(f"{python} cannot be run: {error.strerror or error}") from None
        self._replies: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            greeting = self._hear(limit)
        except BaseException:
            self.close()
            raise
        self.version, self.idle = greeting["version"], int(greeting["idle"])

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed under our hands
            for line in self._process.stdout:
                self._replies.put(line)
        self._replies.put(None)

    def _hear(self, limit: float) -> Any:
        try:
            line = self._replies.get(timeout=limit)
        except queue.Empty:
            self.kill()
            raise Failed(f"no answer after {limit:.0f} s") from None
        if line is None:
            self._replies.put(None)  # for whoever asks again
            raise Failed(f"it stopped: {last_words(self.said(), self._process.wait())}")
        reply = json.loads(line)
        if "missing" in reply:
            raise Absent(reply["missing"])
        if "failed" in reply:
            raise Failed(reply["failed"].strip()[:500])
        return reply["is"]

    def ask(self, call: str, limit: float = 600.0, **given: Any) -> Any:
        """Have something done, and wait for it. Failed: it was not done within `limit` seconds, or went wrong."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, "with": given}) + "\n")
            self._process.stdin.flush()
        except OSError:  # it is gone; what it said is told by _hear
            pass
        return self._hear(limit)

    def said(self) -> str:
        """Everything that it wrote to stderr so far."""
        self._said.flush()
        self._said.seek(0)
        return self._said.read()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let the process leave, or end it."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(GENTLE)
            except subprocess.TimeoutExpired:
                self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def last_words(text: str, code: int) -> str:
    """Of what a process wrote before it stopped, the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1][:300] if lines else "nothing was said"
    return f"{said} (signal {-code})" if code < 0 else said
