"""`fathom tokenizer`: train a tokenizer by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make tokenizers.", no_args_is_help=True)
