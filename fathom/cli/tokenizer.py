"""`fathom tokenizer`: train a tokenizer by itself."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fathom.tokenizer.tokenizer import Tokenizer

app = typer.Typer(help="Make tokenizers.", no_args_is_help=True)


class Kind(str, Enum):
    """What can be learned from text."""

    bpe = "bpe"
    character = "character"


@app.callback()
def tokenizer() -> None:
    """Make tokenizers."""


@app.command()
def train(
    texts: Annotated[list[str], typer.Argument(help="Text files (.txt, .txt.gz), folders of them, or globs.")],
    out: Annotated[Path, typer.Option(help="The folder to write tokenizer.json into.")],
    vocab_size: Annotated[
        int | None, typer.Option(min=258, help="Tokens of a bpe, bytes and end of text included; 4096 if not given.")
    ] = None,
    kind: Annotated[Kind, typer.Option(help="Merged pairs of bytes, or one token a character.")] = Kind.bpe,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Learn a tokenizer from text; use it with tokenizer: {kind: file, path: DIR}.

    Example: fathom tokenizer train books/ --vocab-size 8192 --out my-tokenizer
    """
    from fathom.data.sources import Text, documents
    from fathom.errors import TokenizerError
    from fathom.tokenizer.train import character, train_bpe

    if kind is Kind.character and vocab_size is not None:
        raise TokenizerError("--vocab-size was given for a character tokenizer, which has one token a character.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TokenizerError(f"--out {out} is there already and not an empty folder. Name a new one, or remove it.")
    sources = [Text(kind="text", path=text) for text in texts]
    read = (document for source in sources for document in documents(source, "train"))
    made = character(read) if kind is Kind.character else train_bpe(read, vocab_size or 4096)
    _save(made, out)
    if json_:
        import json

        print(json.dumps({"tokenizer": str(out), "kind": kind.value, "vocab_size": made.vocab_size}))
    else:
        print(f"{made.vocab_size:,} tokens, written to {out / 'tokenizer.json'}")


def _save(made: Tokenizer, out: Path) -> None:
    """Write a folder, whole or not at all."""
    import shutil

    from fathom.errors import TokenizerError

    out = out.absolute()
    draft = out.with_name(f".{out.name}.tmp")
    try:
        made.save(draft)
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except Exception as error:  # tokenizers raises bare Exception where it cannot write
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TokenizerError(f"--out {out} cannot be written: {why}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
