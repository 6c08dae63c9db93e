"""Token shards: the documents of one source as token ids on disk, memory-mapped, made once.

    header.json              format, dtype, tokenizer, totals and files of every split in the folder
    train-00000.tokens       ids one after another, little-endian uint16 (or uint32, for vocabularies beyond 65,536)
    train.ends               int64 (documents): where each document's tokens end
    train.texts              int64 (documents, 2): UTF-8 bytes and words of each document's text

Every document ends with the end-of-text token. Files of tokens have a bounded size: token i is in file number
i // tokens_per_file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fathom.data.cache import flush, written
from fathom.data.sources import Split
from fathom.errors import DataError

FORMAT = 1
TOKENS_PER_FILE = 1 << 28  # 512 MB of uint16
HEADER = "header.json"

Ids = NDArray[np.int64]


def token_dtype(vocab_size: int) -> str:
    """The narrowest that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


@dataclass(frozen=True)
class Totals:
    """What a split holds. tokens count the end of each document; words are what white space separates."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, f) + getattr(other, f) for f in ("documents", "tokens", "bytes", "words")))


class Writer:
    """Writes the shards of one split into a folder; `close` returns what goes into the header."""

    def __init__(self, folder: Path, split: Split, vocab_size: int, tokens_per_file: int = TOKENS_PER_FILE) -> None:
        self.folder, self.split = folder, split
        self.dtype, self.per_file = token_dtype(vocab_size), tokens_per_file
        self.totals = Totals()
        self._ends: IO[bytes] = (folder / f"{split}.ends").open("wb")
        self._texts: IO[bytes] = (folder / f"{split}.texts").open("wb")
        self._tokens: IO[bytes] | None = None

    def add(self, ids: Sequence[int], text: str) -> None:
        """Append a document: its ids, end of text included, and the text that they stand for."""
        self._append(np.asarray(ids, dtype=self.dtype))
        size, words = len(text.encode("utf-8")), len(text.split())
        self.totals += Totals(1, len(ids), size, words)
        self._ends.write(np.array([self.totals.tokens], dtype="<i8").tobytes())
        self._texts.write(np.array([size, words], dtype="<i8").tobytes())

    def _append(self, ids: NDArray[Any]) -> None:
        done, place = 0, self.totals.tokens
        while done < len(ids):
            number, inside = divmod(place + done, self.per_file)
            if inside == 0:
                self._end_file()
                self._tokens = (self.folder / token_file(self.split, number)).open("wb")
            assert self._tokens is not None
            part = ids[done : done + self.per_file - inside]
            self._tokens.write(part.tobytes())
            done += len(part)

    def _end_file(self) -> None:
        if self._tokens is not None:
            flush(self._tokens)
            self._tokens.close()
            self._tokens = None

    def close(self) -> dict[str, Any]:
        """See everything reach the disk."""
        self._end_file()
        for file in (self._ends, self._texts):
            flush(file)
            file.close()
        return vars(self.totals) | {"tokens_per_file": self.per_file}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self._tokens, self._ends, self._texts):
            if file is not None:
                file.close()


def token_file(split: str, number: int) -> str:
    """Name of a file of tokens."""
    return f"{split}-{number:05d}.tokens"


def write_header(folder: Path, vocab_size: int, tokenizer: str, splits: dict[Split, dict[str, Any]]) -> None:
    """The last file of a folder. tokenizer: its fingerprint; splits: what each Writer's `close` returned."""
    said = {"format": FORMAT, "dtype": token_dtype(vocab_size), "tokenizer": tokenizer, "splits": splits}
    written(folder / HEADER, json.dumps(said, indent=2).encode() + b"\n")


def is_whole(folder: Path) -> bool:
    """Whether a folder has a header of this format and every file has the size that it says."""
    try:
        header = json.loads((folder / HEADER).read_text("utf-8"))
        if header["format"] != FORMAT:
            return False
        width = np.dtype(header["dtype"]).itemsize
        return all(
            (folder / name).stat().st_size == size
            for split, said in header["splits"].items()
            for name, size in _sizes(split, said, width)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sizes(split: str, said: dict[str, Any], width: int) -> list[tuple[str, int]]:
    tokens, per_file = said["tokens"], said["tokens_per_file"]
    sizes = [
        (token_file(split, number), width * min(per_file, tokens - start))
        for number, start in enumerate(range(0, tokens, per_file))
    ]
    return [*sizes, (f"{split}.ends", 8 * said["documents"]), (f"{split}.texts", 16 * said["documents"])]


class Shards:
    """The tokens of one source's split, to read. Raises DataError where the folder has no such split or is damaged."""

    def __init__(self, folder: Path, split: Split, name: str) -> None:
        self.folder, self.split, self.name = folder, split, name
        try:
            header = json.loads((folder / HEADER).read_text("utf-8"))
            said = header["splits"][split]
            self.dtype = np.dtype(header["dtype"])
            self.per_file = int(said["tokens_per_file"])
            self.totals = Totals(*(int(said[key]) for key in ("documents", "tokens", "bytes", "words")))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder} holds no {split} shards that can be read ({error}). Remove it; it is made again."
            ) from error

    @property
    def fingerprint(self) -> str:
        """Stands for the ids and their order: the end of the folder's name is the key of what made it."""
        return f"{self.folder.name.rpartition('-')[2]}/{self.split}"

    @property
    def size_on_disk(self) -> int:
        """Bytes of this split's files."""
        return sum(path.stat().st_size for path in self.folder.glob(f"{self.split}[-.]*"))

    @cached_property
    def _files(self) -> list[NDArray[Any]]:
        count = -(-self.totals.tokens // self.per_file)
        names = (token_file(self.split, number) for number in range(count))
        return [np.memmap(self.folder / name, dtype=self.dtype, mode="r") for name in names]

    @cached_property
    def ends(self) -> Ids:
        """(documents): where the tokens of each document end. Contiguous, so that a search in it copies nothing."""
        return np.memmap(self.folder / f"{self.split}.ends", dtype="<i8", mode="r")

    @cached_property
    def texts(self) -> Ids:
        """(documents, 2): UTF-8 bytes and words of each text."""
        return np.memmap(self.folder / f"{self.split}.texts", dtype="<i8", mode="r").reshape(-1, 2)

    def read(self, start: int, stop: int) -> Ids:
        """Tokens start .. stop - 1 of the stream of documents, as a new int64 array."""
        assert 0 <= start <= stop <= self.totals.tokens
        out = np.empty(stop - start, dtype=np.int64)
        done = 0
        while done < len(out):
            number, inside = divmod(start + done, self.per_file)
            part = self._files[number][inside : inside + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def document(self, number: int) -> Ids:
        """The tokens of one document, end of text included."""
        return self.read(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))
