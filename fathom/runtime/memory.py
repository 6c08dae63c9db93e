"""Keeping the memory that training frees.

glibc gives large blocks back to the system as soon as they are freed and asks for them again a moment later, each
time page by page and filled with zeros. Training frees and asks for the same tensors in every step: on two layers of
configs/bench-129m.yaml that was 100,000 page faults and 9 % of a step, and the peak of memory was the same without.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_memory() -> bool:
    """Let this process keep what it frees, where the C library is glibc; whether it does. A choice that the user made
    by MALLOC_ variables or GLIBC_TUNABLES stands. With another allocator preloaded nothing changes."""
    if any(name in os.environ for name in OWN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function: macOS, Windows, musl
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return all([mallopt(M_MMAP_THRESHOLD, 1 << 30), mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)])
