"""What runs inside a contestant's own process: `PYTHON child.py PEER.py`, a JSON object a line, in and out.

    it begins with      {"is": {"version", "idle"}}, or {"missing": module}
    {"call": "open", "with": {"role": "Decoder", ...}}      a contestant
    {"call": name, "with": {...}}                           a method of the contestant
    {"call": "memory"}, {"call": "forget_peak"}             bytes of this process; begin the peak anew
    it answers          {"is": value} or {"failed": what it said}

Nothing of Fathom is imported here. A process of its own makes the peak memory that of the contestant alone, and lets
contestants of different interpreters take turns. What a library prints goes to stderr, since stdout is ours.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from types import ModuleType
from typing import Any


def memory() -> dict[str, int]:
    """Bytes of this process that are in memory now, and at most since the start or `forget_peak`."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return {"now": 1024 * int(found["VmRSS"].split()[0]), "peak": 1024 * int(found["VmHWM"].split()[0])}
    except (OSError, KeyError):  # no /proc: only the peak since the start is known
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"now": peak, "peak": peak}


def forget_peak() -> bool:
    """Let the peak begin at what is in memory now; whether the system can."""
    import gc

    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def opened(path: str) -> ModuleType:
    """The peer's file as a module."""
    spec = importlib.util.spec_from_file_location("contestant", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["contestant"] = module
    spec.loader.exec_module(module)
    return module


def version(packages: tuple[str, ...]) -> str | None:
    """Of the first package that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    for name in packages:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


class Room:
    """A peer's module and the contestant that was opened in it."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.contestant = module, None

    def answer(self, call: str, given: dict[str, Any]) -> Any:
        """Do what is asked."""
        if call == "memory":
            return memory()
        if call == "forget_peak":
            return forget_peak()
        if call == "open":
            self.contestant = getattr(self.module, given["role"])(given)
            return {"setting": getattr(self.contestant, "setting", {})}
        return getattr(self.contestant, call)(**given)


def main() -> None:
    """The script."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]  # our names hide nobody's
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    try:
        room = Room(opened(sys.argv[1]))
    except ImportError as error:
        say({"missing": error.name or str(error)})
        return
    say({"is": {"version": version(room.module.PACKAGES), "idle": memory()["now"]}})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            say({"is": room.answer(asked["call"], asked.get("with", {}))})
        except Exception as error:
            traceback.print_exc()
            say({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
