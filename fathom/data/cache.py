"""The cache on disk: made once, whole or not at all, by whichever process comes first.

A folder is written beside its place and renamed when it is complete, under a lock, so that a killed process leaves
nothing that looks finished and two processes do not do the same work. `FATHOM_CACHE` says where the cache is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fathom.errors import DataError
from fathom.log import log

WHOLE_FILE_HASH = 64 << 20  # larger files are known by size, time of change and three samples
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} if hasattr(errno, "EDQUOT") else {errno.ENOSPC, errno.EFBIG}


def key_of(identity: Any) -> str:
    """32 hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def fingerprint(path: Path, whole: bool = False) -> str:
    """sha256 of a file; of its size, time of change and three samples where it has more than 64 MB (not when whole)."""
    try:
        state = path.stat()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            if whole or state.st_size <= WHOLE_FILE_HASH:
                while block := file.read(1 << 22):
                    digest.update(block)
            else:
                digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
                for start in (0, state.st_size // 2, state.st_size - (1 << 20)):
                    file.seek(start)
                    digest.update(file.read(1 << 20))
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Say in words what stands in the way of writing."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DataError(
                f"There is no space left for the cache in {place} ({_free(place)} free). Make room, or let "
                "FATHOM_CACHE name a folder on another disk; nothing half-written was left behind."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(
                f"The cache in {place} cannot be written: {error.strerror}. Let FATHOM_CACHE name a folder that can."
            ) from error
        raise


def _free(place: Path) -> str:
    while not place.exists() and place != place.parent:
        place = place.parent
    return f"{shutil.disk_usage(place).free / 1e6:,.0f} MB"


def made_once(place: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """The folder `place`, made by make(empty folder) unless it is there and is_whole.

    Two processes may call it at once: one makes, the other waits and finds it made. What a killed process left is
    removed, a damaged folder is made again, and errors leave nothing behind. make() must flush its files (`written`,
    `flush`).
    """
    if place.exists() and is_whole(place):
        return place
    with disk_errors(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place):
            if place.exists():
                if is_whole(place):
                    return place
                log.warning("%s is damaged; making it again", place)
            for left in place.parent.glob(f".{place.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            draft = place.parent / f".{place.name}.{os.getpid()}.tmp"
            draft.mkdir()
            try:
                make(draft)
                if place.exists():
                    os.replace(place, draft.with_suffix(".old.tmp"))
                os.replace(draft, place)
                _sync_folder(place.parent)
            finally:
                for left in place.parent.glob(f".{place.name}.*.tmp"):
                    shutil.rmtree(left, ignore_errors=True)
    return place


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    lock = FileLock(str(place.parent / f".{place.name}.lock"))  # the system lets go of it when its holder dies
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        log.info("another process is making %s; waiting for it", place.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def written(path: Path, *parts: bytes) -> None:
    """Write a file and see it reach the disk."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        flush(file)


def flush(file: Any) -> None:
    """See a file reach the disk."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
