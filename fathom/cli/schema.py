"""`fathom schema`: what editors need to complete the YAML files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="On one line.")] = False,
) -> None:
    """Print the JSON schema of the configuration files.

    Example: fathom schema -o fathom.schema.json, then begin a YAML file with
    # yaml-language-server: $schema=fathom.schema.json
    """
    from fathom.config.schema import json_schema
    from fathom.errors import ConfigError
    from fathom.recipe import RunConfig

    text = json.dumps(json_schema(RunConfig), indent=None if json_ else 2)
    if output is None:
        print(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from None
    print(json.dumps({"schema": str(output)}) if json_ else output)
