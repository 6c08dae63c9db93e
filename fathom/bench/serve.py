"""`fathom bench serve`: the engine by itself and behind HTTP, under the same load, in turns; its cache; what MTP gives.

    scaling     tokens a second with the most requests at once : with one
    HTTP        1 - tokens a second over loopback / tokens a second of the engine, at equal load
    cache       bytes set aside / tokens that they hold, against `Cost.cache_bytes_per_token`
    MTP         a  accepted / drafted;  c  a drafting step / a plain step - 1;  bound (1 + a) / (1 + c)

The engine, the server and the crowd of clients have a process each. Prompts never come twice.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fathom.bench.contestants import Contestant, Entry
from fathom.bench.lanes import Field, Key, Lane
from fathom.bench.machine import Surroundings, measured
from fathom.bench.material import Material
from fathom.bench.pipe import Failed, environment, last_words, with_house
from fathom.bench.spread import Spread, percentile, ratios
from fathom.errors import ConfigError

ENGINE = Entry(Contestant("engine", None, cuda=True))
HTTP = Entry(Contestant("http", None, cuda=True))
SLACK = 16  # tokens by which a request may be longer than it says: a block, never full
TEMPERATURES = (0.0, 1.0)  # of the requests that MTP is measured with
BYTES = {"float32": 4, "bfloat16": 2, "int8": 4}  # of a number in the cache


@dataclass(frozen=True)
class ServeBench:
    """weights: of the model; at_once: requests under way; context, new: tokens of a prompt and after it; waves:
    requests are so many times those at once; urls: other servers to be put under the same load."""

    weights: str = "float32"
    at_once: tuple[int, ...] = (1, 4, 16)
    context: int = 64
    new: int = 64
    waves: int = 2
    rounds: int = 5
    urls: tuple[str, ...] = ()
    quick: bool = False

    @property
    def cache_tokens(self) -> int:
        """That all requests at once need."""
        return max(self.at_once) * (self.context + self.new + SLACK)


def bench(material: Material, around: Surroundings, plan: ServeBench) -> dict[str, Any]:
    """Everything that was measured, for JSON and `show.serve`. ConfigError: requests that the window cannot hold."""
    window = material.run.model.max_position_embeddings
    if plan.context + plan.new > window:
        raise ConfigError(
            f"--context {plan.context} and --new {plan.new} make {plan.context + plan.new} tokens, and the model's "
            f"window holds {window}; give less"
        )
    machine = measured(around, [plan.weights], plan.quick)
    found: dict[str, Any] = {"mtp": None}
    with Field(around, {}) as field:
        engine = field.enter(ENGINE, "ours_decoding", plan.weights, partial(_job, material, around, plan, ("off",)))
        if engine is None:
            raise Failed(f"the engine cannot be opened: {', '.join(field.left_out.values())}")
        found["cache"] = _cache(engine, material, plan)
        with _served(material, around, plan, field):
            found |= _under_load(field, material, plan)
        found["contestants"] = [lane.facts() for lane in field.lanes.values()]
        left_out = field.left_out
    if len(material.model.mtp):
        with Field(around, left_out) as field:
            found["mtp"] = _mtp(field, material, around, plan)
            left_out = field.left_out
    return {
        "bench": "serve",
        **material.facts(),
        "machine": machine.facts(),
        "context": plan.context,
        "new": plan.new,
        "rounds": plan.rounds,
        **found,
        "left_out": left_out,
    }


def _job(material: Material, around: Surroundings, plan: ServeBench, modes: Sequence[str]) -> dict[str, Any]:
    return {
        "role": "Server", "model": material.place(), "weights": plan.weights, "threads": around.threads,
        "device": around.device, "rows": max(plan.at_once), "tokens": plan.cache_tokens, "speculative": list(modes),
    }  # fmt: skip


def _cache(engine: Lane, material: Material, plan: ServeBench) -> dict[str, Any]:
    """What a token costs, as set aside and by the formula."""
    told = engine.child.ask("cache")
    formula = material.cost.cache_bytes_per_token(BYTES[plan.weights])
    return {**told, "bytes_per_token": told["bytes"] / told["tokens"], "formula": formula}


# --- load ------------------------------------------------------------


def _under_load(field: Field, material: Material, plan: ServeBench) -> dict[str, Any]:
    """Every number of requests at once, every way, once a round."""
    field.each(lambda lane: _load(lane, material, plan, min(plan.at_once), "warm up"))
    samples: dict[tuple[Key, int], list[dict[str, Any]]] = {}
    for turn in range(plan.rounds):
        for at_once in plan.at_once:
            for key, sample in field.each(lambda lane: _load(lane, material, plan, at_once, turn)).items():  # noqa: B023
                samples.setdefault((key, at_once), []).append(sample)
    speeds = {
        where: [one["tokens"] / one["seconds"] for one in taken]
        for where, taken in samples.items()
        if where[0] in field.lanes
    }
    return {
        "rows": [_row(where, samples[where], speeds[where]) for where in speeds],
        "scaling": _scaling(speeds, plan),
        "http_cost": _http_cost(speeds, plan),
    }


def _load(lane: Lane, material: Material, plan: ServeBench, at_once: int, turn: int | str) -> dict[str, Any]:
    prompts: list[Any] = material.prompts(at_once * plan.waves, plan.context, at_once, turn, lane.name)
    if lane.name.startswith("http://"):
        prompts = [material.tokenizer.decode(prompt) for prompt in prompts]
    return lane.child.ask("load", mode="off", prompts=prompts, at_once=at_once, new=plan.new)


def _row(where: tuple[Key, int], taken: Sequence[Mapping[str, Any]], speeds: Sequence[float]) -> dict[str, Any]:
    (way, weights), at_once = where
    return {
        "way": way,
        "arithmetic": weights,
        "at_once": at_once,
        "tokens_per_second": Spread.of(speeds).facts(),
        "first_seconds": _percentiles([x for one in taken for x in one["first"]]),
        "gap_seconds": _percentiles([x for one in taken for x in one["gaps"]]),
    }


def _percentiles(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {f"p{share}": percentile(ordered, share) for share in (50, 90, 99)} if ordered else {}


def _scaling(speeds: Mapping[tuple[Key, int], Sequence[float]], plan: ServeBench) -> dict[str, Any]:
    """The most at once against the fewest, round by round."""
    few, most = min(plan.at_once), max(plan.at_once)
    ways = dict.fromkeys(way for way, _ in speeds)
    return {
        way[0]: {"few": few, "most": most, "ratio": ratios(speeds[way, most], speeds[way, few]).facts()}
        for way in ways
        if few != most and (way, most) in speeds and (way, few) in speeds
    }


def _http_cost(speeds: Mapping[tuple[Key, int], Sequence[float]], plan: ServeBench) -> dict[str, Any]:
    """The share of the engine's tokens a second that is lost, round by round."""
    costs = {}
    for at_once in plan.at_once:
        engine, http = (speeds.get(((entry.name, plan.weights), at_once)) for entry in (ENGINE, HTTP))
        if engine and http:
            lost = [1 - theirs / ours for ours, theirs in zip(engine, http, strict=True)]
            costs[str(at_once)] = Spread.of(lost).facts()
    return costs


# --- the server ------------------------------------------------------------


@contextmanager
def _served(material: Material, around: Surroundings, plan: ServeBench, field: Field) -> Iterator[None]:
    """`fathom serve` over loopback, and a crowd for it and for every other server; a server that does not come up is
    left out."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        port = _free_port()
        process = subprocess.Popen(
            _command(material, around, plan, port),
            stdout=said,
            stderr=said,
            env=with_house(environment(around.threads, around.preload)),
        )
        try:
            url = f"http://127.0.0.1:{port}"
            problem = _ready(process, url, around.limit)
            if problem is None:
                field.enter(HTTP, "crowd", plan.weights, lambda: {"role": "Crowd", "url": url})
            else:
                said.seek(0)
                field.left_out["http"] = f"{problem}: {last_words(said.read(), process.poll() or 0)}"
            for other in plan.urls:
                entry = Entry(Contestant(other, None, cuda=True))
                field.enter(entry, "crowd", "", lambda other=other: {"role": "Crowd", "url": other})  # type: ignore[misc]
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _command(material: Material, around: Surroundings, plan: ServeBench, port: int) -> list[str]:
    weights = ["--quantization", "int8"] if plan.weights == "int8" else ["--dtype", plan.weights]
    return [
        sys.executable, "-m", "fathom", "serve", material.place(), "--port", str(port), "--device", around.device,
        *weights, "--threads", str(around.threads),
        "--max-num-seqs", str(max(plan.at_once)), "--cache-tokens", str(plan.cache_tokens),
        "--speculative", "off", "--no-access-log",
    ]  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ready(process: subprocess.Popen[bytes], url: str, limit: float) -> str | None:
    """Wait until the server answers; what is wrong, if it does not."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if process.poll() is not None:
            return "fathom serve stopped"
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5) as reply:
                if reply.status == 200:
                    return None
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return f"fathom serve was not ready after {limit:.0f} s"


# --- MTP ------------------------------------------------------------


def _mtp(field: Field, material: Material, around: Surroundings, plan: ServeBench) -> list[dict[str, Any]] | None:
    """One request at a time with drafts, without, and as the engine decides, in turns, at each temperature; None where
    it failed."""
    modes = ("off", "on", "auto")
    lane = field.enter(ENGINE, "ours_decoding", plan.weights, partial(_job, material, around, plan, modes))
    if lane is None:
        return None

    def run(mode: str, temperature: float, turn: int | str) -> dict[str, Any]:
        assert lane is not None
        prompts = material.prompts(plan.waves, plan.context, "mtp", turn)
        return lane.child.ask("load", mode=mode, prompts=prompts, at_once=1, new=plan.new, temperature=temperature)

    found = []
    try:
        for mode in modes:
            run(mode, 0.0, "warm up")
        for temperature in TEMPERATURES:
            taken: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
            for turn in range(plan.rounds):
                for mode in modes:
                    taken[mode].append(run(mode, temperature, turn))
            found.append({"temperature": temperature, **speculation(taken)})
    except Failed as error:
        field.drop(lane, error)
        return None
    return found


def speculation(taken: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Acceptance, draft cost, bound and what was measured, from the same requests off, on and auto."""
    drafted, accepted = (sum(one[what] for one in taken["on"]) for what in ("drafted", "accepted"))
    steps = {mode: [step[0] for one in taken[mode] for step in one["steps"]] for mode in ("off", "on", "auto")}
    plain, drafting = (Spread.of(steps[mode]).median for mode in ("off", "on"))
    speed = {mode: [one["tokens"] / one["seconds"] for one in taken[mode]] for mode in taken}
    a, c = accepted / max(1, drafted), drafting / plain - 1
    return {
        "acceptance": a,
        "draft_cost": c,
        "bound": (1 + a) / (1 + c),
        "plain_step": plain,
        "drafting_step": drafting,
        "speed_up": ratios(speed["on"], speed["off"]).facts(),
        "auto_speed_up": ratios(speed["auto"], speed["off"]).facts(),
        "auto_speculating": bool(taken["auto"][-1]["speculating"]),
        "auto_steps": len(steps["auto"]),
    }
