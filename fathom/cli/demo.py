"""`fathom demo`: from raw text to a trained model, an evaluation, samples and a report, with one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PRESET = "laptop.yaml"


def command(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ..., laid over the file.", metavar="[KEY=VALUE]...")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The run folder; a number is added if it is taken.")
    ] = (Path("runs/demo")),
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Train configs/laptop.yaml on the embedded text, evaluate it, print samples, write a report.

    Example: fathom demo training.max_steps=100
    """
    import json

    from fathom.cli.eval import evaluated, show
    from fathom.pretrain import train
    from fathom.report.html import write
    from fathom.report.read import read

    folder = free(output)
    run = train(preset(PRESET), [*(overrides or []), f"training.output_dir={folder}"])
    if run.signal is not None:
        raise typer.Exit(128 + run.signal)
    found = evaluated(run, "validation")
    tables = read(folder)
    page = write([tables], folder / "report.html")
    if json_:
        print(json.dumps({"run": str(folder), "report": str(page), **run.metrics, "validation": found.facts()}))
        return
    show(found, "the whole validation split: texts that training never saw")
    for sample in tables.samples:
        if sample.step == run.step:
            print(f"\n{sample.prompt}{sample.text}")
    print(f"\nRun     {folder}\nReport  {page.resolve()}\nNext    fathom generate {folder} --prompt 'The state of'")


def preset(name: str) -> Path:
    """A configuration that comes with Fathom: in a source tree beside the package, else where pip puts data files."""
    import sys

    from fathom.errors import ConfigError

    places = [Path(__file__).parents[2] / "configs", Path(sys.prefix) / "share" / "fathom" / "configs"]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise ConfigError(
        f"{name} was looked for in {' and '.join(map(str, places))} and is not there; reinstall fathom-lm"
    )


def free(folder: Path) -> Path:
    """The folder itself, or the first of folder-2, folder-3, ... that is not taken."""
    number, chosen = 1, folder
    while chosen.exists() and any(chosen.iterdir()):
        number += 1
        chosen = folder.with_name(f"{folder.name}-{number}")
    return chosen
