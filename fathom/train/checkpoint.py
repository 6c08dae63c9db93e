"""The run folder, and checkpoints that are whole or not there.

    run.json                    {"format": 1, ...}
    config.yaml, hparams.yaml, environment.json, metrics.csv, ...        see `metrics.py`
    checkpoints/step-N/
        model.safetensors       weights, under Hugging Face's names
        optimizer/              moments, by torch.distributed.checkpoint; not there before the first step
        rng.safetensors         random generators, by rank
        trainer.json            counters, loader, guards, tables' accumulators
        checksums.json          sha256 and size of every file above; written last

A checkpoint is written into a hidden folder beside its place, brought to the disk file by file, and renamed: a rename
is there or is not. Bad blocks and half-copied folders are found by the checksums when it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fathom.errors import CheckpointError
from fathom.log import log

FORMAT = 1
STEP = re.compile(r"step-(\d+)")

Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class Names(Protocol):
    """Two inverse functions between a model's state and the tensors on disk; `hub.names.Names` is one."""

    @property
    def to_disk(self) -> Rename: ...
    @property
    def from_disk(self) -> Rename: ...


@dataclass(frozen=True)
class _Plain:
    to_disk: Rename = dict
    from_disk: Rename = dict


PLAIN: Names = _Plain()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete: step, folder, and the contents of trainer.json."""

    step: int
    path: Path
    trainer: dict[str, Any]

    @property
    def imported(self) -> bool:
        """Whether it is a model from elsewhere: weights, and nothing of a training."""
        return bool(self.trainer.get("imported"))

    @property
    def val_loss(self) -> float | None:
        """The validation loss measured at this very step, or None."""
        value = self.trainer["state"]["val_loss"]
        return value if value is not None and math.isfinite(value) else None

    def model_state(self, names: Names = PLAIN) -> dict[str, Tensor]:
        """The weights, under the model's names."""
        with safe_open(self.path / "model.safetensors", framework="pt") as file:
            return names.from_disk({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - no dict

    def load_model(self, model: nn.Module, names: Names = PLAIN) -> None:
        """Put the weights into a model. CheckpointError where names or shapes differ."""
        state, own = self.model_state(names), model.state_dict()
        lost, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
        if lost or extra or shapes:
            raise CheckpointError(
                f"{self.path} holds another model: missing {lost[:3]}, unknown {extra[:3]}, of another shape "
                f"{shapes[:3]}; "
                "resume with the model section that the run began with"
            )
        model.load_state_dict(state)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's flat state; empty before the first step. Read by torch.distributed.checkpoint, whose index is
        pickled: only for one's own runs."""
        if not (self.path / "optimizer").exists():
            return {}
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        reader = dcp.FileSystemReader(self.path / "optimizer")
        state: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, no_dist=True)
        return state

    def rng_state(self, rank: int = 0) -> dict[str, Tensor] | None:
        """The random generators of a rank, or None if that rank was not there."""
        prefix = f"rank{rank}."
        with safe_open(self.path / "rng.safetensors", framework="pt") as file:
            keys = [k for k in file.keys() if k.startswith(prefix)]  # noqa: SIM118
            return {k.removeprefix(prefix): file.get_tensor(k) for k in keys} or None


class RunFolder:
    """A run on disk. Make one with `create`, open one with `open`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @classmethod
    def create(cls, path: str | os.PathLike[str], facts: Mapping[str, Any] | None = None) -> RunFolder:
        """Begin a run. CheckpointError if one is there already, or if something that is not a run is in the way."""
        folder = cls(path)
        if (folder.path / "run.json").exists():
            raise CheckpointError(
                f"{folder.path} holds a run already; go on with it (--resume {folder.path}), "
                "or choose another training.output_dir"
            )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write("run.json", json.dumps({"format": FORMAT, **(facts or {})}, indent=1) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot begin a run in {folder.path}: {error.strerror or error}; choose another training.output_dir"
            ) from error
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Open a run. CheckpointError if there is none, or if a newer Fathom wrote it."""
        folder = cls(path)
        file = folder.path / "run.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["format"]
        except FileNotFoundError:
            hint = "there is no such folder" if not folder.path.exists() else "it has no run.json"
            raise CheckpointError(f"{folder.path} is not a run folder: {hint}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); is {folder.path} a run folder?") from error
        if not isinstance(found, int) or found > FORMAT:
            raise CheckpointError(
                f"{file} has format {found}, and this Fathom knows up to {FORMAT}; install a newer fathom-lm"
            )
        return folder

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run folder, whole or not at all."""
        write_whole(self.path / name, text.encode())

    @property
    def begun(self) -> bool:
        """Whether there is any checkpoint, whole or damaged; a run killed before its first begins again at step 0."""
        return bool(self._present())

    def complete(self) -> list[int]:
        """Steps that have a checkpoint with all its parts (checksums not compared), rising."""
        if not self.checkpoints.is_dir():
            return []
        found = [(STEP.fullmatch(p.name), p) for p in self.checkpoints.iterdir()]
        return sorted(int(m[1]) for m, p in found if m and (p / "checksums.json").is_file())

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step, checksums compared. CheckpointError if it is missing or damaged."""
        path = self.checkpoints / f"step-{step}"
        if not path.is_dir():
            have = ", ".join(map(str, self.complete())) or "none"
            raise CheckpointError(f"{self.path} has no checkpoint of step {step}; it has: {have}")
        verify(path)
        return _read(path)

    def latest(self) -> Checkpoint:
        """The newest checkpoint that is whole; damaged ones are passed over with a warning. CheckpointError if none is
        left."""
        damaged = []
        for step in reversed(self._present()):
            try:
                return self.at(step)
            except CheckpointError as error:
                log.warning("%s; falling back to the checkpoint before", error)
                damaged.append(step)
        what = f"only damaged checkpoints ({', '.join(map(str, damaged))})" if damaged else "no checkpoint yet"
        raise CheckpointError(
            f"{self.path} has {what}; nothing to open or to resume: start the run again in a new folder"
        )

    def best(self) -> Checkpoint:
        """The checkpoint with the lowest validation loss. CheckpointError if none was evaluated."""
        scored = []
        for step in self.complete():
            loss = _try_val_loss(self.checkpoints / f"step-{step}")
            if loss is not None:
                scored.append((loss, step))
        if not scored:
            raise CheckpointError(f"{self.path} has no checkpoint with a validation loss; use its latest, or a step")
        return self.at(min(scored)[1])

    def find(self, which: str | int | None = None) -> Checkpoint:
        """None or "latest", "best", or a step."""
        if which is None or which == "latest":
            return self.latest()
        if which == "best":
            return self.best()
        if not str(which).isdigit():
            raise CheckpointError(f"{self.path}@{which}: after @ comes best, latest or the number of a step")
        return self.at(int(which))

    def _present(self) -> list[int]:
        if not self.checkpoints.is_dir():
            return []
        matches = [STEP.fullmatch(p.name) for p in self.checkpoints.iterdir()]
        return sorted(int(m[1]) for m in matches if m)

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor] | Callable[[Path], object],
        optimizer: Mapping[str, Tensor],
        rng: Mapping[str, Tensor],
        trainer: Mapping[str, Any],
        names: Names = PLAIN,
    ) -> Path:
        """Write a checkpoint, whole or not at all; one of the same step is replaced. model: the weights, or what writes
        model.safetensors into a folder. CheckpointError when the disk refuses, and then every earlier checkpoint is
        untouched."""
        final, hidden = self.checkpoints / f"step-{step}", self.checkpoints / f".step-{step}.{os.getpid()}"
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            if callable(model):
                model(hidden)
            else:
                tensors = _for_disk(names.to_disk(dict(model)))
                save_file(tensors, hidden / "model.safetensors", metadata={"format": "pt"})
            if optimizer:
                _save_optimizer(hidden / "optimizer", optimizer)
            save_file(_for_disk(rng), hidden / "rng.safetensors")
            (hidden / "trainer.json").write_text(json.dumps(trainer, indent=1) + "\n", encoding="utf-8")
            sums = {str(p.relative_to(hidden).as_posix()): _facts(p) for p in _files(hidden)}
            (hidden / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
            for file in _files(hidden):
                shutil.copymode(hidden / "trainer.json", file)  # safetensors makes files that only their owner reads
                _sync(file)
            for folder in {file.parent for file in _files(hidden)}:
                _sync(folder)
            if final.exists():
                old = self.checkpoints / f".old-step-{step}.{os.getpid()}"
                final.rename(old)
                shutil.rmtree(old, ignore_errors=True)
            hidden.rename(final)
            _sync(self.checkpoints)
        except BaseException as error:  # torch.distributed.checkpoint's own exception is no Exception
            why = "the disk is full" if _is_full(self.path) else _first_line(error)
            shutil.rmtree(hidden, ignore_errors=True)
            if not _is_of_the_disk(error):
                raise
            kept = self.complete()
            have = f"the checkpoint of step {kept[-1]} stands" if kept else "there is no earlier one"
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} into {self.checkpoints}: {why}; {have}. "
                "Free space (training.keep_last lowers what a run needs), then go on with --resume"
            ) from error
        return final

    def forget_after(self, step: int) -> list[int]:
        """Delete the checkpoints past a step, before training goes on from it: they belong to a future that is being
        written anew. Returns their steps."""
        gone = [s for s in self._present() if s > step]
        for past in gone:
            self._delete(past)
        return gone

    def lock(self) -> FileLock:
        """Hold the run for this process until released (or dead). CheckpointError if another process trains into it."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CheckpointError(
                f"another process is training into {self.path}; wait for it, stop it, or choose another "
                f"training.output_dir"
            ) from None
        return lock

    def _delete(self, step: int) -> None:
        hidden = self.checkpoints / f".old-step-{step}.{os.getpid()}"
        (self.checkpoints / f"step-{step}").rename(
            hidden
        )  # at once: a folder half deleted must not look like a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)

    def prune(self, keep_last: int | None, keep: set[int]) -> list[int]:
        """Delete all but the last `keep_last` complete checkpoints (None: all stay) and the steps of `keep`; also what
        a killed process left half-written. Returns the steps deleted."""
        for left in self.checkpoints.glob(".*step-*"):
            shutil.rmtree(left, ignore_errors=True)
        steps = self.complete()
        gone = [] if keep_last is None else [s for s in steps[: max(0, len(steps) - keep_last)] if s not in keep]
        for step in gone:
            self._delete(step)
        return gone


def verify(path: Path) -> None:
    """Compare a checkpoint's files with its checksums. CheckpointError names the first that is missing or differs."""
    try:
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        wanted = {str(name): (int(fact["size"]), str(fact["sha256"])) for name, fact in sums.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is incomplete: checksums.json, which is written last, is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: checksums.json cannot be read ({_first_line(error)})") from error
    for name in ("model.safetensors", "rng.safetensors", "trainer.json"):
        if name not in wanted:
            raise CheckpointError(f"{path} is damaged: checksums.json does not speak of {name}")
    for name, (size, digest) in wanted.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{path} is damaged: {name} has {file.stat().st_size} bytes of {size}")
        if _digest(file) != digest:
            raise CheckpointError(f"{path} is damaged: the checksum of {name} differs")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before, whatever happens meanwhile."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        hidden.write_bytes(content)
        _sync(hidden)
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def _read(path: Path) -> Checkpoint:
    try:
        trainer = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        return Checkpoint(int(trainer["state"]["step"]), path, trainer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: trainer.json cannot be read ({_first_line(error)})") from error


def _try_val_loss(path: Path) -> float | None:
    try:
        return _read(path).val_loss
    except (CheckpointError, KeyError, TypeError):
        return None


def _for_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two sharing memory, as safetensors wants it."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != flat.numel() * flat.element_size():
            flat = flat.clone()
        seen.add(flat.untyped_storage().data_ptr())
        out[name] = flat
    return out


def _save_optimizer(path: Path, state: Mapping[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True)
    with warnings.catch_warnings():  # one process is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(state), storage_writer=writer, no_dist=True)


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file())


def _facts(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": _digest(file)}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Bring a file or folder to the disk. Windows cannot open folders; there a rename is as safe as the system makes
    it."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether an error, or one inside it (torch.distributed.checkpoint wraps those of all ranks), is of writing a
    file."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):
        return True
    return isinstance(error, (OSError, SafetensorError)) or (isinstance(error, RuntimeError) and "write" in str(error))


def _is_full(place: Path) -> bool:
    """Whether there is next to no space. PyTorch's writers say so in words of their own, or of the zip format."""
    try:
        return shutil.disk_usage(place).free < 1 << 16
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    inner = getattr(error, "failures", None)
    if inner:  # {rank: (exception, traceback)}
        error = next(iter(inner.values()))[0]
    text = getattr(error, "strerror", None) or str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
