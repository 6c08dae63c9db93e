"""`fathom export`: a run in other people's formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fathom.cli.sampling import RunArgument
from fathom.cli.verify import EngineOption, show_engines, watched

if TYPE_CHECKING:
    from fathom.hub.lint import Finding
    from fathom.load import Stored
    from fathom.verify.engines import Parity

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def command(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder (hf) or file (gguf) to write; a new one.")],
    to: Annotated[Literal["hf", "gguf"], typer.Option(help="Hugging Face's format, or llama.cpp's.")],
    family: Annotated[
        str | None,
        typer.Option(help="hf: deepseek_v3, deepseek_v2, qwen2_moe, ... (default: auto, the first that fits)."),
    ] = None,
    mtp: Annotated[
        bool | None,
        typer.Option("--mtp/--no-mtp", help="With the MTP depths (default: hf where there is a place, gguf without)."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="hf: of the weights (default: as stored).")
    ] = None,
    kind: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None, typer.Option("--type", help="gguf: of matrices (default: f16).")
    ] = None,
    shard_size: Annotated[str | None, typer.Option(help="hf: bytes of a file, as 5GB (the default) or 500MB.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run what was written in the engines that are installed, beside ours.")
    ] = False,
    engine: EngineOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Write a run for transformers, vLLM, SGLang, mlx-lm (hf), or for llama.cpp, Ollama, LM Studio (gguf).

    What is written is complete, or absent. Exit code 1 when --verify finds a difference.
    Example: fathom export runs/demo exported --to hf --verify
    """
    import json

    from fathom.errors import ConfigError
    from fathom.load import stored
    from fathom.verify.engines import chosen

    only_hf = {"--family": family, "--dtype": dtype, "--shard-size": shard_size}
    strange: dict[str, Any] = only_hf if to == "gguf" else {"--type": kind}
    given = [name for name, value in strange.items() if value is not None]
    if given:
        raise ConfigError(f"{' and '.join(given)} cannot be given with --to {to}; see fathom export --help")
    if engine and not verify:
        raise ConfigError("--engine says where to verify; give --verify with it")
    engines = chosen(engine or [])
    if to == "gguf":
        deaf = [each.engine.name for each in engines if each.named and each.engine.wants != to]
        if deaf:
            raise ConfigError(f"{' and '.join(deaf)} is not asked about a GGUF file; verify with --engine llama.cpp")
        engines = [each for each in engines if each.engine.wants == to]
    most = size(shard_size or "5GB")
    found = stored(run)
    if to == "hf":
        facts, findings = to_hf(found, out, family or "auto", mtp, dtype, most)
    else:
        facts, findings = to_gguf(found, out, kind or "f16", bool(mtp))
    told: list[Parity] = []
    if verify:
        told = list(watched(judged(run, out, to, kind or "f16", engines), len(engines)))
    if json_:
        said = [{"engine": f.engine, "what": f.what, "remedy": f.remedy, "silent": f.silent} for f in findings]
        every = {"export": str(out), "run": str(found.path), "step": found.step, "to": to, **facts, "findings": said}
        print(json.dumps({**every, "engines": [parity.facts() for parity in told]} if verify else every))
    else:
        show(found, out, facts, told)
    if not all(parity.passed for parity in told):
        raise typer.Exit(1)


def size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a plain number -> bytes. ConfigError: it is none of them."""
    from fathom.errors import ConfigError

    read = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if read is None or read[2] not in UNITS or int(float(read[1]) * UNITS[read[2]]) < 1:
        raise ConfigError(f"--shard-size is {text!r}; possible are sizes such as 5GB, 500MB and 2GiB")
    return int(float(read[1]) * UNITS[read[2]])


def to_hf(
    found: Stored, out: Path, family: str, mtp: bool | None, dtype: str | None, shard_bytes: int
) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """Write the folder; what it is, and what is known to go wrong with it."""
    from fathom.hub.huggingface import export
    from fathom.log import log

    done = export(
        found.config, found.weights, out, found.tokenizer,
        family=family, mtp=mtp, dtype=dtype, shard_bytes=shard_bytes,
    )  # fmt: skip
    for finding in done.findings:
        if not finding.silent:  # the others were told by `export` itself
            log.warning("%s", finding)
    size = sum((done.folder / name).stat().st_size for name in done.files)
    return {"family": done.family, "files": list(done.files), "bytes": size}, done.findings


def to_gguf(found: Stored, out: Path, kind: str, mtp: bool) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """Write the file; what it is."""
    from fathom.hub.gguf import export_gguf

    file = export_gguf(found.config, found.weights, out, found.tokenizer, kind=kind, mtp=mtp, name=found.path.name)
    return {"type": kind, "files": [file.name], "bytes": file.stat().st_size}, ()


def judged(run: str, out: Path, to: str, kind: str, engines: list[Any]) -> Any:
    """What was written, in the engines: a folder beside itself as we read it back (llama.cpp gets a GGUF file of those
    weights), a GGUF file beside the run."""
    from fathom.load import load
    from fathom.tokenizer.ids import is_of_ids
    from fathom.verify.engines import ALLOWED, parities

    opened = load(out if to == "hf" else run)
    words = None if is_of_ids(opened.tokenizer) else opened.tokenizer
    if to == "hf":
        return parities(opened.model, words, engines, folder=out)
    return parities(opened.model, words, engines, gguf=out, allowed=ALLOWED if kind == "f32" else None)


def show(found: Stored, out: Path, facts: dict[str, Any], told: list[Parity]) -> None:
    """What was written, for a person."""
    from fathom.cli.plan import amount

    what = facts.get("family") or f"GGUF, {facts['type']}"
    print(f"{out}: {found.path} after step {found.step} as {what}, {amount(facts['bytes'], 'B')}")
    if told:
        show_engines(told)
