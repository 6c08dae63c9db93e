"""`fathom report`: one page about runs, from what they left on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, e.g. runs/demo.", metavar="RUN [RUN]...")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the page here. Default: RUN/report.html, of several ./report.html."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Write one HTML page about one or more runs; several are compared.

    Example: fathom report runs/demo, or fathom report runs/a runs/b -o compared.html
    """
    from fathom.report.html import write
    from fathom.report.read import read_runs

    tables = read_runs(runs)
    path = write(tables, output)
    if not json_:
        print(path)
        return
    import json
    from dataclasses import asdict

    from fathom.report.summary import summarize

    found = [{"run": str(run.path), "name": run.name, **asdict(summarize(run))} for run in tables]
    print(json.dumps({"report": str(path), **(found[0] if len(found) == 1 else {"runs": found})}))
