"""`fathom bench NAME`: our speed beside the peers', in one run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from fathom.bench.machine import Surroundings
    from fathom.bench.material import Material

PRESET = "bench-129m.yaml"

HELP = """Measure Fathom beside its peers: in turns, in one run, as ratios.

Example: fathom bench decode --quick"""

app = typer.Typer(help=HELP, no_args_is_help=True)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value ..., laid over the YAML file.", metavar="[KEY=VALUE]...")
]
Config = Annotated[
    str | None,
    typer.Option(metavar="CONFIG|RUN", help=f"A YAML file (random weights) or a run (default: configs/{PRESET})."),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=PYTHON],...",
        help="Who else takes part: transformers, llama.cpp, mlx-lm, vllm, litgpt, all or none; PYTHON is the "
        "interpreter that has it (default: all that are installed).",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Turns of every contestant; the median counts.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of every contestant (default: all cores).")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Allocator = Annotated[
    str, typer.Option(help="Memory allocator of every contestant: system, tcmalloc, jemalloc, or a library's path.")
]
Limit = Annotated[float, typer.Option(min=1, help="Seconds that a contestant may take to open.")]
Quick = Annotated[bool, typer.Option("--quick", help="A trial in seconds: few rounds, short work, no figure to keep.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command()
def train(
    overrides: Overrides = None,
    config: Config = None,
    peers: Peers = None,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or auto; several with commas, each against its like.")
    ] = "auto",
    rounds: Rounds = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an optimizer step, on all sides.")] = 2048,
    slow: Annotated[float, typer.Option(min=1, help="Seconds of a step beyond which a peer is left out.")] = 120.0,
    threads: Threads = None,
    device: Device = "cpu",
    allocator: Allocator = "system",
    limit: Limit = 600.0,
    quick: Quick = False,
    json_: Json = False,
) -> None:
    """Tokens a second of a training step, share of the machine's product rate, memory above the parameter state.

    Example: fathom bench train --peers transformers --precision float32
    """
    from fathom.bench import show
    from fathom.bench.contestants import entries
    from fathom.bench.train import TrainBench, bench

    playing, left = entries(peers or [], "trains")
    plan = TrainBench(_precisions(precision), rounds, tokens=tokens, slow=slow)
    if quick:
        plan = replace(plan, rounds=min(rounds, 2), warm_up=1, tokens=min(tokens, 256), quick=True)
    with _ground(config, overrides, threads, device, allocator, limit) as (material, around):
        found = bench(material, playing, left, around, plan)
    _tell(found, show.train, json_)


@app.command()
def decode(
    overrides: Overrides = None,
    config: Config = None,
    peers: Peers = None,
    weights: Annotated[
        str, typer.Option(help="float32, bfloat16, int8; several with commas, each against its like.")
    ] = "float32",
    batch: Annotated[str, typer.Option(help="Rows at once; several with commas, as 1,8,16.")] = "1",
    context: Annotated[str, typer.Option(help="Tokens of a prompt; several with commas.")] = "16,256,1024",
    new: Annotated[int, typer.Option(min=2, help="Tokens after each prompt.")] = 32,
    rounds: Rounds = 5,
    slow: Annotated[float, typer.Option(min=1, help="Seconds of reading beyond which a peer is left out.")] = 30.0,
    sweep: Annotated[
        Literal["context", "batch", "experts"] | None,
        typer.Option(help="Time a token against context, rows, or experts at equal active parameters."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw the sweep into this folder, as SVG.")
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    allocator: Allocator = "system",
    limit: Limit = 600.0,
    quick: Quick = False,
    json_: Json = False,
) -> None:
    """Tokens a second of reading prompts and of writing, with the same weights on all sides.

    Example: fathom bench decode --config runs/demo --peers llama.cpp --weights float32 --batch 1,8
    """
    from fathom.bench import show
    from fathom.bench.contestants import WEIGHTS, entries
    from fathom.bench.decode import DecodeBench, bench
    from fathom.bench.sweep import SWEEPS, draw, swept
    from fathom.errors import ConfigError

    chosen = tuple(dict.fromkeys(filter(None, weights.split(","))))
    unknown = [word for word in chosen if word not in WEIGHTS]
    if unknown or not chosen:
        raise ConfigError(f"--weights is {weights}; possible are {', '.join(WEIGHTS)}")
    if plot is not None and sweep is None:
        raise ConfigError(f"--plot draws a sweep; give --sweep {', '.join(SWEEPS)} with it")
    playing, left = entries(peers or [], "decodes")
    plan = DecodeBench(chosen, _numbers("batch", batch), _numbers("context", context), new, rounds, slow)
    if quick:
        plan = replace(plan, rounds=min(rounds, 2), new=min(new, 8), quick=True)
    with _ground(config, overrides, threads, device, allocator, limit) as (material, around):
        if sweep is None:
            found = bench(material, playing, left, around, plan)
        else:
            found = swept(sweep, material, playing, left, around, plan)
    if plot is not None:
        found["plot"] = str(draw(found, plot))
    _tell(found, show.decode if sweep is None else show.sweep, json_)


@app.command()
def serve(
    overrides: Overrides = None,
    config: Config = None,
    weights: Annotated[Literal["float32", "bfloat16", "int8"], typer.Option(help="Weights of the model.")] = "float32",
    at_once: Annotated[str, typer.Option(help="Requests under way; several with commas.")] = "1,4,16",
    context: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new: Annotated[int, typer.Option(min=2, help="Tokens after each prompt.")] = 64,
    rounds: Rounds = 5,
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="Another server of the same model, put under the same load: http://host:port; may be repeated."
        ),
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    allocator: Allocator = "system",
    limit: Limit = 600.0,
    quick: Quick = False,
    json_: Json = False,
) -> None:
    """The engine and `fathom serve` under the same load: tokens a second, latencies, cache bytes, what MTP gives.

    Example: fathom bench serve --config runs/demo --at-once 1,16
    """
    from fathom.bench import show
    from fathom.bench.pipe import Failed
    from fathom.bench.serve import ServeBench, bench
    from fathom.errors import ConfigError
    from fathom.runtime.device import serving_threads

    wrong = [each for each in url or () if not re.fullmatch(r"http://[^/\s:]+(:\d+)?(/\S*)?", each)]
    if wrong:
        raise ConfigError(f"--url is {wrong[0]}; possible is http://host:port, without TLS")
    plan = ServeBench(weights, _numbers("at-once", at_once), context, new, rounds=rounds, urls=tuple(url or ()))
    if quick:
        plan = replace(plan, rounds=min(rounds, 2), context=min(context, 16), new=min(new, 8), waves=1, quick=True)
    with _ground(config, overrides, threads, device, allocator, limit) as (material, around):
        if threads is None and device == "cpu":
            around = replace(around, threads=serving_threads(material.cost.active_parameters(), around.threads))
        try:
            found = bench(material, around, plan)
        except Failed as error:
            raise ConfigError(str(error)) from None
    _tell(found, show.serve, json_)


@app.command()
def data(
    overrides: Overrides = None,
    config: Config = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    allocator: Allocator = "system",
    limit: Limit = 600.0,
    quick: Quick = False,
    json_: Json = False,
) -> None:
    """Tokenizing, shards and batches, in tokens a second and against the rate of training.

    Example: fathom bench data --config configs/laptop.yaml
    """
    from fathom.bench import show
    from fathom.bench.data import DataBench, bench

    plan = DataBench(rounds, texts=2, batches=8, steps=1, quick=True) if quick else DataBench(rounds)
    with _ground(config, overrides, threads, "cpu", allocator, limit) as (material, around):
        found = bench(material, around, plan)
    _tell(found, show.data, json_)


def _numbers(name: str, words: str) -> tuple[int, ...]:
    """`1,8,16`. ConfigError: no whole numbers above 0."""
    from fathom.errors import ConfigError

    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", words):
        raise ConfigError(f"--{name} is {words}; possible are whole numbers above 0 with commas, as 1,8,16")
    return tuple(dict.fromkeys(int(word) for word in words.split(",")))


@contextmanager
def _ground(
    config: str | None, overrides: list[str] | None, threads: int | None, device: str, allocator: str, limit: float
) -> Iterator[tuple[Material, Surroundings]]:
    """What is benched and what under, in a folder that is gone afterwards."""
    import tempfile

    from fathom.bench.machine import surroundings
    from fathom.bench.material import Material
    from fathom.cli.demo import preset

    around = surroundings(threads, device, allocator, limit)
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as scratch:
        given = str(preset(PRESET)) if config is None else config
        yield Material.of(given, overrides or [], Path(scratch)), around


def _precisions(words: str) -> tuple[str, ...]:
    """Names of arithmetics. ConfigError: an unknown one."""
    from fathom.errors import ConfigError
    from fathom.runtime.device import DTYPES, canonical, cpu_has_bfloat16

    found = []
    for word in filter(None, words.split(",")):
        name = str(canonical(word))
        if name == "auto":
            name = "bfloat16" if cpu_has_bfloat16() else "float32"
        if name not in DTYPES:
            raise ConfigError(f"--precision is {word}; possible are auto, {', '.join(DTYPES)}")
        found.append(name)
    return tuple(dict.fromkeys(found)) or ("float32",)


def _tell(found: dict[str, Any], show: Any, json_: bool) -> None:
    """For a person, or as a line of JSON."""
    import json

    if json_:
        print(json.dumps(found))
    else:
        show(found)
