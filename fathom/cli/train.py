"""`fathom train`: make a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run, e.g. configs/laptop.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ..., laid over the file.", metavar="[KEY=VALUE]...")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run: its folder, or RUN@500 for an earlier checkpoint.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the configuration and print the plan; train nothing.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Train a model: configuration in, run folder out. SIGINT (Ctrl-C) and SIGTERM save and leave.

    Example: fathom train configs/laptop.yaml training.max_steps=100 training.output_dir=runs/mine
    """
    if dry_run:
        from fathom.cli.plan import command as plan

        plan(config, overrides, json_=json_)
        return
    import json
    import os

    from fathom.pretrain import train

    run = train(config, overrides or [], resume=resume)
    if int(os.environ.get("RANK", "0")) == 0:
        if json_:
            print(json.dumps({"run": str(run.path), "step": run.step, **run.metrics}))
        elif run.signal is None:
            print(f"Done: {run.path}. Look at it with: fathom report {run.path}")
        else:
            print(f"Saved after step {run.step}. Go on with: fathom train {config} --resume {run.path}")
    if run.signal is not None:
        raise typer.Exit(128 + run.signal)
