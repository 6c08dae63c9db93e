"""`fathom serve`: a run behind an HTTP API that OpenAI's clients know."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fathom.cli.sampling import DeviceOption, DtypeOption, RunArgument

if TYPE_CHECKING:
    from fathom.load import Run
    from fathom.serve.answers import ModelDetails
    from fathom.serve.engine import Engine, EngineConfig
    from fathom.serve.service import Service

KEYS = "FATHOM_API_KEYS"
Speculation = Literal["auto", "on", "off"]


def command(
    run: RunArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one, as containers need.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 5000,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quantization: Annotated[
        Literal["none", "int8"], typer.Option(help="int8: weights of a byte, computed with as before.")
    ] = "none",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of the engine (default: all cores; one for a model too small to share out)."
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="The model's name, or one of them (default: the folder's).")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a step reads at most.")] = 512,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens in a block of the cache.")] = 16,
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the cache holds (default: by what is asked and by memory).")
    ] = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Do not read again what an earlier prompt began with.")
    ] = True,
    speculative: Annotated[Speculation, typer.Option(help="Let MTP depths draft: auto while it is faster.")] = "auto",
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="CUDA: do not record passes as CUDA graphs.")
    ] = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"A key that callers must have; may be given again. Better in {KEYS}, with commas between."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with a key a line; # begins a comment.")] = None,
    rate_limit: Annotated[int | None, typer.Option(min=1, help="Requests a minute of each key or address.")] = None,
    token_rate_limit: Annotated[int | None, typer.Option(min=1, help="Tokens a minute of each key or address.")] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 4 << 20,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request is given up.")] = 600.0,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may call from a browser; may be given again.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that answers may go on after SIGTERM.")] = 30.0,
    access_log: Annotated[bool, typer.Option(help="Print a JSON line a request on stdout.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Serve a run over HTTP: OpenAI's API, /generate, /health, /ready, /metrics.

    Example: fathom serve runs/demo --port 5000
    """
    import time

    needed()
    from fathom.log import log
    from fathom.serve import server
    from fathom.serve.engine import EngineConfig
    from fathom.serve.service import ServerConfig

    config = ServerConfig(
        api_keys=tuple(keys(api_key or [], api_key_file)), requests_per_minute=rate_limit,
        tokens_per_minute=token_rate_limit, max_body=max_body, max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens, timeout=timeout, cors_origins=tuple(cors_origin or ()),
    )  # fmt: skip
    knobs = EngineConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, block_size=block_size,
        cache_tokens=cache_tokens, enable_prefix_caching=enable_prefix_caching, speculative=speculative,
        enforce_eager=enforce_eager, max_num_queued=max_queue,
    )  # fmt: skip
    with interruptible():
        listener = server.bind(host, port)  # before the model is loaded, so that a port in use is told at once
        served, engine = made(run, device, dtype, quantization, threads, served_model_name or [], knobs)
        url, started = f"http://{shown(host)}:{listener.getsockname()[1]}", time.monotonic()
        clean = server.run(
            served, config, listener, grace=grace, log_accesses=access_log,
            up=lambda: log.info("%s", greeting(url, served.names[0], bool(config.api_keys))),
        )  # fmt: skip
    stats = engine.stats()
    log.info("%d prompt tokens, %d generated", stats.prompt_tokens, stats.generation_tokens)
    if json_:
        import json

        counts = {"prompt_tokens": stats.prompt_tokens, "generation_tokens": stats.generation_tokens}
        facts = {"url": url, "model": served.names[0], **counts, "seconds": time.monotonic() - started, "clean": clean}
        print(json.dumps(facts))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C until the server takes both: as process 1 of a container, it would be lost."""
    import signal

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def made(
    run: str,
    device: str,
    dtype: str,
    quantization: str,
    threads: int | None,
    names: list[str],
    knobs: EngineConfig,
) -> tuple[Service, Engine]:
    """A run, opened and given an engine. UserErrors: as `load` has them; a name that is empty."""
    import torch

    from fathom.errors import ConfigError
    from fathom.load import load
    from fathom.model.cost import Cost
    from fathom.model.native.build import library
    from fathom.runtime.device import serving_threads
    from fathom.serve.engine import Engine

    if not all(name.strip() for name in names):
        raise ConfigError("--served-model-name is empty; give a name, or leave it out for the folder's")
    # Where two threads have a team of OpenMP each, it has the members sleep and not spin between products, which costs
    # the engine a tenth of its rate. So nothing here is done by a team.
    every = torch.get_num_threads()
    torch.set_num_threads(1)
    opened = load(run, device, dtype)
    if quantization == "int8":
        from fathom.model.quantize import quantize_int8

        opened = replace(opened, model=quantize_int8(opened.model))
    if opened.model.embed_tokens.weight.device.type == "cpu":
        library()  # compiled before anybody waits for an answer
    engine = Engine(opened.model, opened.tokenizer, knobs)
    known = None if quantization == "none" else quantization
    threads = threads or serving_threads(Cost(opened.model.config).active_parameters(), every)
    return service(opened, engine, tuple(names or [opened.path.resolve().name]), known, threads), engine


def needed() -> None:
    """DependencyError: a package that serving needs is not installed."""
    from importlib import import_module

    from fathom.errors import DependencyError

    for name in ("fastapi", "uvicorn", "prometheus_client", "orjson"):
        try:
            import_module(name)
        except ImportError:
            raise DependencyError(
                f"Serving needs the package {name}; install what belongs to it: pip install 'fathom-lm[serve]'"
            ) from None


def keys(given: list[str], file: Path | None) -> list[str]:
    """All API keys: options, a file, the environment. ConfigError: one is empty, or the file cannot be read."""
    from fathom.errors import ConfigError

    found = [(key.strip(), "--api-key") for key in given]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from None
        inside = [line.partition("#")[0].strip() for line in lines]
        found += [(key, str(file)) for key in inside if key]
        if not any(inside):
            raise ConfigError(f"--api-key-file {file} holds no key; the server would be open to all")
    if os.environ.get(KEYS):
        found += [(key.strip(), KEYS) for key in os.environ[KEYS].split(",")]
    for key, where in found:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{where} holds an API key that is empty or has blanks or characters beyond ASCII")
    return [key for key, _ in found]


def service(run: Run, engine: Engine, names: tuple[str, ...], quantization: str | None, threads: int) -> Service:
    """A run and its engine, whose CPU threads are so many, as what the API serves."""
    from fathom.load import is_exported
    from fathom.serve.chat import template_of
    from fathom.serve.service import Service
    from fathom.serve.worker import Worker

    size = run.model.config.vocab_size
    assert size is not None, "an open run has a size"
    return Service(
        names=names,
        window=run.model.config.max_position_embeddings,
        vocabulary=size,
        details=details(run, quantization),
        tokenizer=run.tokenizer,
        chat=template_of(run.tokenizer, chat_template(run.path)),
        worker=partial(Worker, engine, threads=threads),
        special=is_exported(run.path),
    )


def details(run: Run, quantization: str | None) -> ModelDetails:
    """What /v1/models tells."""
    from fathom.model.cost import Cost
    from fathom.model.precision import compute_dtype
    from fathom.serve.answers import ModelDetails

    config, cost, weight = run.model.config, Cost(run.model.config), run.model.embed_tokens.weight
    layers = [layer for layer in range(config.num_hidden_layers) if config.moe_of(layer)]
    return ModelDetails(
        step=run.step,
        parameters=cost.parameters(),
        active_parameters=cost.active_parameters(),
        cache_bytes_per_token=cost.cache_bytes_per_token(compute_dtype(weight).itemsize),
        num_hidden_layers=config.num_hidden_layers,
        moe_layers=layers,
        n_routed_experts=config.moe.n_routed_experts if config.moe is not None and layers else 0,
        num_experts_per_tok=config.moe.num_experts_per_tok if config.moe is not None and layers else 0,
        num_nextn_predict_layers=config.mtp.num_nextn_predict_layers,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(run.device),
        quantization=quantization,
        val_loss=run.metrics.get("val_loss"),
    )


def chat_template(folder: Path) -> str | None:
    """The Jinja template that a Hugging Face folder, or the tokenizer of a run, brings; None: the plain one.
    TokenizerError: tokenizer_config.json names several and none is the default."""
    import json

    from fathom.errors import TokenizerError
    from fathom.tokenizer.chat import JINJA

    where = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    file, config = where / "chat_template.jinja", where / "tokenizer_config.json"
    found: Any = None
    if file.is_file():
        found = file.read_text(encoding="utf-8")
    elif config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):
        named = {each["name"]: each["template"] for each in found}
        if "default" not in named:
            raise TokenizerError(f"{config} has the chat templates {', '.join(named)}, and none is named default")
        found = named["default"]
    return None if found is None or found == JINJA else str(found)


def shown(host: str) -> str:
    """A host as a URL has it."""
    return f"[{host}]" if ":" in host else host


def greeting(url: str, model: str, keyed: bool) -> str:
    """Where it listens, and how to ask."""
    key = "-H 'Authorization: Bearer KEY' " if keyed else ""
    body = f'{{"model": "{model}", "prompt": "Once upon a time", "max_tokens": 40}}'
    return (
        f"{model} listens at {url} (OpenAI's API: {url}/v1). Ctrl-C stops it. Try:\n\n"
        f"  curl {url}/v1/completions {key}-H 'Content-Type: application/json' -d '{body}'\n"
    )
