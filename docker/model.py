"""Begin the model service: `fathom serve` with the mounted model, or words on how to get one and exit code 2.

FATHOM_MODEL           where the model is (/model); /model@best and /model@500 are checkpoints of a run
FATHOM_MODEL_NAME      the name that clients give (default: the folder's)
FATHOM_SERVE_OPTIONS   more options, as on a command line
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

NONE = """There is no model in {place}.

Train one; on a CPU it takes minutes, and it is written to runs/demo:

    make demo

then start this again:

    docker-compose up model-service

Another run, or an exported folder, is mounted so:

    MODEL_PATH=path/to/run docker-compose up model-service

If Docker has just made an empty runs/demo, it belongs to root and stands in the way: sudo rmdir runs/demo"""


def command(arguments: list[str]) -> list[str]:
    """What is run. SystemExit: the options cannot be read."""
    try:
        options = shlex.split(os.environ.get("FATHOM_SERVE_OPTIONS", ""))
    except ValueError as error:
        sys.exit(f"FATHOM_SERVE_OPTIONS cannot be read: {error}")
    name = os.environ.get("FATHOM_MODEL_NAME")
    named = ["--served-model-name", name] if name else []
    model = os.environ.get("FATHOM_MODEL", "/model")
    return ["fathom", "serve", model, "--host", "0.0.0.0", "--port", "5000", *named, *options, *arguments]


def main(arguments: list[str]) -> int:
    """Look for the model, then become the server, which gets the signals itself."""
    place = Path(os.environ.get("FATHOM_MODEL", "/model").partition("@")[0])
    try:
        empty = not any(place.iterdir())
    except FileNotFoundError:
        empty = True
    except OSError as error:
        print(f"{place} cannot be read by user {os.getuid()}: {error.strerror}.", file=sys.stderr)
        return 2
    if empty:
        print(NONE.format(place=place), file=sys.stderr)
        return 2
    serve = command(arguments)
    return os.execvp(serve[0], serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
