"""`fathom COMMAND ...`: the table of commands. Each is imported when it is called, so that `--help` needs no torch.

Exit codes: 0 done; 2 a mistake that the user can mend, told in one message without a traceback; 130 interrupted.
A bug keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from fathom.errors import UserError
from fathom.log import speak
from fathom.version import __version__

COMMANDS = {  # name: (module, what stands in it, one line for --help)
    "demo": ("fathom.cli.demo", "command", "Train a small model on real text, evaluate it, write a report."),
    "train": ("fathom.cli.train", "command", "Train a model: configuration in, run folder out."),
    "data": ("fathom.cli.data", "command", "Prepare the token shards of a configuration and count them."),
    "tokenizer": ("fathom.cli.tokenizer", "app", "Train a tokenizer by itself."),
    "generate": ("fathom.cli.generate", "command", "Continue a prompt."),
    "chat": ("fathom.cli.chat", "command", "Talk to a run in the terminal."),
    "serve": ("fathom.cli.serve", "command", "Serve a run over HTTP, with OpenAI's API."),
    "eval": ("fathom.cli.eval", "command", "Measure loss, perplexity and bits per byte."),
    "export": ("fathom.cli.export", "command", "Write a run for transformers, vLLM, llama.cpp and others."),
    "import": ("fathom.cli.import_", "command", "Make a run of a Hugging Face model."),
    "verify": ("fathom.cli.verify", "command", "Certify a run, by its own slow paths and by other engines."),
    "client": ("fathom.cli.client", "command", "Open a page for an API: text, chat, and the experts of every token."),
    "plan": ("fathom.cli.plan", "command", "Count parameters, FLOPs, cache and memory before training."),
    "bench": ("fathom.cli.bench", "app", "Measure speed beside transformers, llama.cpp and others, in turns."),
    "report": ("fathom.cli.report", "command", "Write one HTML page about one or more runs."),
    "schema": ("fathom.cli.schema", "command", "Print the JSON schema of the YAML files, for editors."),
}


class Commands(TyperGroup):
    """The table as a group. `--help` sees only the table; `resolve_command` opens the module."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Stand-ins with the name and the line of help; typer's own "did you mean" reads them too.
        self.commands = {name: TyperCommand(name, help=row[2], short_help=row[2]) for name, row in COMMANDS.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, stand_in if stand_in is None else open_command(str(stand_in.name)), rest


def open_command(name: str) -> Any:
    """Import a command."""
    module, attribute, _ = COMMANDS[name]
    target = getattr(import_module(module), attribute)
    if isinstance(target, typer.Typer):
        group = get_group(target)
        group.name = name
        return group
    alone = typer.Typer(add_completion=False)
    alone.command(name)(target)
    return get_command(alone)


app = typer.Typer(cls=Commands, name="fathom", no_args_is_help=True, add_completion=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fathom {__version__}")
        raise typer.Exit()


@app.callback()
def fathom(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Train, measure and use DeepSeek-style language models.

    Example: fathom train configs/laptop.yaml training.max_steps=100
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    speak()
    try:
        get_command(app)(args=None if arguments is None else list(arguments), prog_name="fathom")
    except UserError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


def complain(message: str) -> None:
    """`error: message` on stderr, in red where there is colour."""
    from rich.console import Console
    from rich.text import Text

    sys.stdout.flush()
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))


if __name__ == "__main__":
    sys.exit(main())
