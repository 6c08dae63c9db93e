"""The training loader: micro-batch 0, 1, 2, ... of this rank, made ahead in a thread, and where it stands as JSON."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import Field, model_validator

from fathom.batch import Batch
from fathom.data.packing import BatchingConfig, Packed, Packing
from fathom.data.sources import SourceConfig, Split
from fathom.errors import CheckpointError
from fathom.knobs import Knobs, Many

SMALLEST_FRACTION = 1e-5  # below it, deciding whether a source has enough documents would take reading too many


class DataConfig(Knobs):
    """What is read, and in which order."""

    datasets: Many[SourceConfig] = Field(min_length=1)
    """One source, or several whose rows are mixed by weight."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the text that is held out for validation where a source has no validation split of its own."""
    test_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the text that is held out for testing where a source has no test split of its own."""
    batching: BatchingConfig = Packed()
    """How documents become rows."""
    prefetch: int = Field(default=2, ge=0)
    """Batches that are made ahead in a thread; 0: none."""
    offline: bool = False
    """Never touch the network: what is not in a cache is refused."""

    @model_validator(mode="after")
    def _something_is_left(self) -> DataConfig:
        for name in ("validation_fraction", "test_fraction"):
            if 0 < getattr(self, name) < SMALLEST_FRACTION:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0, or at least {SMALLEST_FRACTION}")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} leave nothing "
                "to train on; their sum must be below 1"
            )
        return self

    @property
    def fractions(self) -> dict[Split, float]:
        """What is held out where a source has none of its own."""
        return {"validation": self.validation_fraction, "test": self.test_fraction}


class TrainLoader:
    """Endless micro-batches of this rank; satisfies `train.callbacks.Loader`.

    packing    makes micro-batch i;   order  what identifies the data and its order, as JSON: a state of another order
               is refused;   prefetch  how many batches to make ahead, 0 for none

    `state_dict` speaks of the batches handed out. `close` ends the thread; a closed loader begins again when asked.
    """

    def __init__(
        self, packing: Packing, order: dict[str, Any], *, rank: int = 0, world: int = 1, prefetch: int = 2
    ) -> None:
        self._packing, self._order, self._prefetch = packing, order, prefetch
        self._rank, self._world = rank, world
        self._next = 0
        self._ahead: _Ahead | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._prefetch:
            batch = self._make(self._next)
        else:
            if self._ahead is None:
                self._ahead = _Ahead(self._make, self._next, self._prefetch)
            try:
                batch = self._ahead.take()
            except BaseException:
                self.close()
                raise
        self._next += 1
        return batch

    def _make(self, index: int) -> Batch:
        return self._packing.batch(index, self._rank, self._world)

    @property
    def epoch(self) -> float:
        """Passes over the data so far: rows handed out by rows there are."""
        return self._next / self._packing.epoch_batches

    def state_dict(self) -> dict[str, Any]:
        """How many micro-batches were handed out, and of which order."""
        return {"micro_index": self._next, **self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken. CheckpointError: it is of other data, or of another order."""
        other = [key for key in self._order if state[key] != self._order[key]]
        if other:
            lines = [f"{WORDS.get(key, key)} {state[key]!r} then, {self._order[key]!r} now" for key in other]
            raise CheckpointError(
                f"The checkpoint stands in another order of data: {'; '.join(lines)}. "
                "Resume with the configuration of the run, or begin a new run."
            )
        index = int(state["micro_index"])
        if index < 0:
            raise CheckpointError(f"The checkpoint's micro_index is {index}; it is damaged.")
        self.close()
        self._next = index

    def close(self) -> None:
        """End the thread, if there is one, and forget what it made ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


WORDS = {
    "seed": "seed of the order",
    "batch_size": "training.batch_size",
    "sequence_length": "training.sequence_length",
    "data": "text, tokenizer, weights and batching (fingerprint)",
}


class _Ahead:
    """A thread that makes items index, index + 1, ... ahead of their use; its errors are raised by `take`."""

    def __init__(self, make: Callable[[int], Batch], index: int, depth: int) -> None:
        self._made: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, index), name="fathom-data", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], Batch], index: int) -> None:
        while not self._stop.is_set():
            try:
                item: Batch | BaseException = make(index)
            except BaseException as error:  # handed over to the consumer
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return
            index += 1

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._made.put(item, timeout=0.1)
                return
            except queue.Full:  # nobody takes any; perhaps because nobody will
                continue

    def take(self) -> Batch:
        """The next item, waited for."""
        item = self._made.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        while not self._made.empty():
            self._made.get_nowait()
        self._thread.join()
