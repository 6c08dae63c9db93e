"""The logger of the house: `log = logging.getLogger("fathom")`, printed by rank 0 only.

A library must not speak unless asked, so nothing is attached at import; `cli/` calls `speak` once.
"""

from __future__ import annotations

import logging
import os
import sys

log = logging.getLogger("fathom")
log.addHandler(logging.NullHandler())


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is at that moment: a test or a notebook may have put another in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def speak(level: int = logging.INFO) -> None:
    """Print log records to stderr, one plain line each, warnings marked as such; silent on ranks other than 0."""

    class Plain(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            text = super().format(record)
            return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"

    for old in list(log.handlers):
        log.removeHandler(old)
    if int(os.environ.get("RANK", "0")) != 0:
        log.addHandler(logging.NullHandler())
        return
    handler = _Stderr()
    handler.setFormatter(Plain("%(message)s"))
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
