"""What the judges share: the servers' addresses, checks that are counted, and the line that says what was seen."""

from __future__ import annotations

import os
import sys
from typing import Any

OPEN = os.environ.get("FATHOM_URL", "http://127.0.0.1:5000")
KEYED = os.environ.get("FATHOM_KEYED_URL", "")
KEY = os.environ.get("FATHOM_KEY", "")
RUN = os.environ.get("FATHOM_RUN", "")
MODEL = os.environ.get("FATHOM_MODEL", "judged")


class Checks:
    """Counts what held and what did not."""

    def __init__(self) -> None:
        self.held = 0
        self.failed: list[str] = []

    def __call__(self, what: str, held: Any, shown: Any = None) -> None:
        """Note a check, and print it."""
        print(f"  {'ok  ' if held else 'FAIL'} {what}" + ("" if shown is None else f": {shown}"), flush=True)
        if held:
            self.held += 1
        else:
            self.failed.append(what)

    def end(self, seen: str) -> None:
        """Say what was seen, and leave."""
        print(f"SEEN {seen}; {self.held} checks held, {len(self.failed)} failed", flush=True)
        sys.exit(1 if self.failed else 0)
