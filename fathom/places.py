"""Where Fathom keeps what can be made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """FATHOM_CACHE, or `fathom` in the platform's own place for caches."""
    named = os.environ.get("FATHOM_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "fathom"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "fathom" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "fathom"
