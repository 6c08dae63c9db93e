"""Datasets of the Hugging Face hub, without ever hanging: one bounded question finds the commit, and everything else
follows from it. What has been turned into token shards needs neither the network nor the package `datasets` again."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from fathom.data.cache import disk_errors, fingerprint, key_of
from fathom.errors import DataError, DependencyError
from fathom.log import log
from fathom.places import cache_folder

PATIENCE = 10.0  # seconds that the hub may take to say which commit is the newest
WAY_OUT = "Train on local text ({kind: text, path: ...}) or on the embedded text ({kind: embedded}) instead"


def identity(path: str, subset: str | None, split: str, revision: str | None, offline: bool) -> dict[str, Any]:
    """What the rows of a split depend on: the commit, or the contents of a local folder."""
    fixed: dict[str, Any] = {"subset": subset, "split": split}
    if Path(path).is_dir():
        inside = sorted(p for p in Path(path).rglob("*") if p.is_file() and not p.name.startswith("."))
        return fixed | {"files": [[str(p.relative_to(path)), fingerprint(p)] for p in inside]}
    commit = commit_of(path, revision, offline)
    if commit is not None:
        return fixed | {"path": path, "commit": commit}
    dataset = _load(
        path, subset, split, revision, streaming=False, offline=offline
    )  # in datasets' own cache, or refused
    return fixed | {"path": path, "cached": dataset._fingerprint}


def commit_of(path: str, revision: str | None, offline: bool) -> str | None:
    """The commit that a revision stands for: asked of the hub, or remembered from the last time it could be asked."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    memory = cache_folder() / "hub" / f"{key_of([path, revision])}.json"
    found = None if offline or is_offline() else ask(path, revision)
    if found is not None:
        with disk_errors(memory):
            memory.parent.mkdir(parents=True, exist_ok=True)
            draft = memory.with_suffix(f".{os.getpid()}.tmp")
            draft.write_text(json.dumps({"path": path, "revision": revision, "commit": found}), "utf-8")
            draft.replace(memory)
        return found
    try:
        return str(json.loads(memory.read_text("utf-8"))["commit"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_offline() -> bool:
    """Whether the user's environment forbids the network."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


@lru_cache(maxsize=64)
def ask(path: str, revision: str | None) -> str | None:
    """The hub's answer, or None where it does not answer in time; asked once a process, so that a run sees one commit.

    Raises DataError where the hub answers that there is no such dataset or revision.
    """
    _datasets()
    from huggingface_hub import HfApi
    from huggingface_hub import errors as refusals

    said: list[str | BaseException | None] = []

    def call() -> None:
        try:
            said.append(HfApi().dataset_info(path, revision=revision, timeout=PATIENCE).sha)
        except BaseException as error:  # handed over to the asking thread
            said.append(error)

    thread = threading.Thread(target=call, daemon=True)  # looking up a host's name knows no time-out of its own
    thread.start()
    thread.join(PATIENCE + 1)
    answer = said[0] if said else None
    refused = (refusals.RepositoryNotFoundError, refusals.RevisionNotFoundError, refusals.HFValidationError)
    if isinstance(answer, refused):
        raise DataError(
            f"The hub has no dataset {path!r}"
            + (f" at revision {revision!r}" if revision else "")
            + " that you may read. "
            "Check the name; for a private or gated dataset log in first: `hf auth login`."
        ) from answer
    if isinstance(answer, str):
        return answer
    log.warning("the hub does not answer (%s); looking in the caches", answer or f"waited {PATIENCE:.0f} s")
    return None


def rows(
    path: str, subset: str | None, split: str, revision: str | None, field: str, *, streaming: bool, offline: bool
) -> tuple[int | None, Iterator[str]]:
    """How many rows there are, where that is known, and the text of each."""
    dataset = _load(path, subset, split, revision, streaming=streaming, offline=offline)
    columns = dataset.column_names
    if columns is not None and field not in columns:
        raise DataError(f"{path} has no column {field!r}; it has {', '.join(columns)}. Set text_field to one of these.")
    if not streaming:
        return len(dataset), _texts(dataset, path, field)
    splits = dataset.info.splits or {}
    return (splits[split].num_examples or None) if split in splits else None, _texts(dataset, path, field)


def _texts(dataset: Any, path: str, field: str) -> Iterator[str]:
    try:
        for batch in dataset.select_columns([field]).iter(batch_size=1000):
            for text in batch[field]:
                if text is not None and not isinstance(text, str):
                    raise DataError(
                        f"The column {field!r} of {path} holds {type(text).__name__}, not text. Set text_field."
                    )
                yield text or ""
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # datasets lets the errors of a dozen packages through
        raise DataError(f"Reading {path} broke off ({_brief(error)}). Try again, or: {WAY_OUT}.") from error


def _load(path: str, subset: str | None, split: str, revision: str | None, *, streaming: bool, offline: bool) -> Any:
    datasets = _datasets()
    local = Path(path).is_dir()
    reached = None if local or offline or is_offline() else _reached(path, revision)
    wanted: dict[str, Any] = {"split": split, "streaming": streaming}
    try:
        if local:
            return datasets.load_dataset(path, subset, **wanted)
        if reached is not None:
            return datasets.load_dataset(path, subset, revision=reached, **wanted)
        with _forbidden_network():
            return datasets.load_dataset(path, subset, revision=revision, **wanted)
    except ValueError as error:  # a wrong subset or split; the message lists the right ones
        raise DataError(f"{path}: {_brief(error)} Correct subset or split in data.datasets.") from error
    except Exception as error:  # datasets lets the errors of a dozen packages through
        if local or reached is not None:
            raise DataError(f"The dataset {path} cannot be opened: {_brief(error)}. {WAY_OUT}.") from error
        why = "the network is switched off" if offline or is_offline() else "the hub cannot be reached"
        raise DataError(f"The dataset {path} is not on this machine, and {why}. {WAY_OUT}.") from error


def _reached(path: str, revision: str | None) -> str | None:
    """The commit, if the hub can be reached now."""
    found = ask(path, None if revision and re.fullmatch("[0-9a-f]{40}", revision) else revision)
    return revision if found is not None and revision and re.fullmatch("[0-9a-f]{40}", revision) else found


@contextmanager
def _forbidden_network() -> Iterator[None]:
    """Let `datasets` look only in its cache: with the network down it would try each file again for 23 seconds."""
    import datasets.config
    import huggingface_hub.constants

    homes: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [home.HF_HUB_OFFLINE for home in homes]
    try:
        for home in homes:
            home.HF_HUB_OFFLINE = True
        yield
    finally:
        for home, value in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = value


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise DependencyError(
            'Datasets of the hub need the package datasets. Install it: pip install "fathom-lm[hub]"'
        ) from None
    return datasets


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
