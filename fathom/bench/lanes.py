"""A contestant under way: its process, how it is set, and what was said where it dropped out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fathom.bench.contestants import Entry
from fathom.bench.machine import Surroundings
from fathom.bench.pipe import Absent, Child, Failed
from fathom.errors import UserError
from fathom.log import log

T = TypeVar("T")
Key = tuple[str, str]


@dataclass
class Lane:
    """name: of the contestant; arithmetic: of its weights or its training; setting: in its own words; tried: seconds of
    the settings that it tried; other, torch: as in `Contestant`."""

    name: str
    arithmetic: str
    child: Child
    setting: dict[str, Any] = field(default_factory=dict)
    tried: dict[str, float] = field(default_factory=dict)
    other: bool = False
    torch: bool = False

    @property
    def key(self) -> Key:
        """Name and arithmetic."""
        return self.name, self.arithmetic

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} {self.arithmetic}".strip()

    def memory(self, state: int) -> dict[str, int]:
        """Bytes: the peak since it was forgotten; of it the process with its libraries alone (idle), the parameter
        state, and what is above both."""
        peak = int(self.child.ask("memory")["peak"])
        return {"peak": peak, "idle": self.child.idle, "state": state, "above": peak - self.child.idle - state}

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        told = {"contestant": self.name, "arithmetic": self.arithmetic, "version": self.child.version}
        return {**told, "setting": self.setting, "tried": self.tried}


class Field:
    """The lanes of a bench. left_out: who does not take part, and why. Closing it ends all processes."""

    def __init__(self, around: Surroundings, left_out: Mapping[str, str]) -> None:
        self.around = around
        self.lanes: dict[Key, Lane] = {}
        self.left_out: dict[str, str] = dict(left_out)

    def enter(
        self,
        entry: Entry,
        file: str,
        arithmetic: str,
        job: Callable[[], dict[str, Any]],
        choose: dict[str, Any] | None = None,
    ) -> Lane | None:
        """Start a contestant and open it with the job; None, and a line in left_out, where that fails.

        choose: what its `choose` is given to find its best setting. It then begins anew in another process, so that
        what was tried leaves nothing in its memory.
        """
        if self.around.device != "cpu" and not entry.contestant.cuda:
            self.left_out[entry.name] = f"it is benched on CPUs only, and --device is {self.around.device}"
            return None
        title, child = f"{entry.name} {arithmetic}".strip(), None
        try:
            given = job()
            log.info("opening %s", title)
            child = self.around.child(file, entry.python)
            told, tried = child.ask("open", limit=self.around.limit, **given), {}
            if choose is not None:
                found = child.ask("choose", limit=self.around.limit, **choose)
                tried = {way: float(seconds) for way, seconds in found["tried"].items()}
                child.close()
                child = self.around.child(file, entry.python)
                told = child.ask("open", limit=self.around.limit, **given, kept=found["kept"])
            lane = Lane(entry.name, arithmetic, child, told["setting"], tried)
            lane.other, lane.torch = entry.contestant.other, entry.contestant.torch
        except Absent as error:
            self.left_out[entry.name] = f"not installed ({error} is missing): {entry.contestant.install}"
        except (Failed, UserError) as error:
            self.left_out[title] = str(error)
            if child is not None:
                child.close()
        else:
            self.lanes[lane.key] = lane
            return lane
        return None

    def drop(self, lane: Lane, error: Exception) -> None:
        """A contestant failed; it takes no further part."""
        self.left_out[lane.title] = str(error)
        log.warning("%s drops out: %s", lane.title, error)
        self.lanes.pop(lane.key, None)
        lane.child.close()

    def each(self, work: Callable[[Lane], T], lanes: Iterable[Lane] | None = None) -> dict[Key, T]:
        """Do something with every lane; those that fail drop out."""
        found = {}
        for lane in list(self.lanes.values() if lanes is None else lanes):
            try:
                found[lane.key] = work(lane)
            except Failed as error:
                self.drop(lane, error)
        return found

    def in_turns(
        self, rounds: int, work: Callable[[Lane, int], T], lanes: Iterable[Lane] | None = None
    ) -> dict[Key, list[T]]:
        """A B A B ...: every lane (or those given) once a round, told its number. One that fails takes no further part,
        and its samples are dropped."""
        playing = list(self.lanes.values() if lanes is None else lanes)
        found: dict[Key, list[T]] = {lane.key: [] for lane in playing if lane.key in self.lanes}
        for turn in range(rounds):
            still = [lane for lane in playing if lane.key in self.lanes]
            for key, sample in self.each(lambda lane: work(lane, turn), still).items():  # noqa: B023 - called at once
                found[key].append(sample)
        return {key: samples for key, samples in found.items() if key in self.lanes}

    def close(self) -> None:
        """End all processes."""
        for lane in self.lanes.values():
            lane.child.close()
        self.lanes.clear()

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
