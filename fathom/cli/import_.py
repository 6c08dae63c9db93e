"""`fathom import`: a Hugging Face model becomes a run that generates, is measured and trains on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A Hugging Face folder, or a hub name (owner/model).")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder to make; a new one.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Make a run of a Hugging Face model (DeepSeek V2 and V3, Qwen2Moe, Mixtral, Ernie4_5_Moe, Llama).

    Example: fathom import exported runs/again, then fathom train runs/again/config.yaml --resume runs/again
    """
    import json

    made = imported(path, run)
    if json_:
        facts = {"run": str(run), "from": path, "family": made.family, "parameters": made.parameters}
        print(json.dumps({**facts, "tokenizer": made.has_tokenizer, "vocab_size": made.vocab_size}))
        return
    print(f"{run}: {made.family}, {made.parameters:,} parameters" + ("" if made.has_tokenizer else "; token ids only"))
    print(
        f"Train on with: fathom train {run}/config.yaml --resume {run} training.max_steps=100\n"
        "Its text is the embedded one until you name yours: data.datasets='[{kind: text, path: book.txt}]'"
    )


@dataclass(frozen=True)
class Imported:
    """A run that was made: the family it came from, its size, and whether it brought a tokenizer."""

    family: str
    parameters: int
    vocab_size: int
    has_tokenizer: bool


def imported(path: str, run: Path) -> Imported:
    """Make a run whose checkpoint of step 0 has the weights of a Hugging Face folder, in their own dtype; training goes
    on from it with fresh moments. Weights go through memory one at a time.

    CheckpointError, ConfigError: what cannot be read, each by name; a run or folder that is there already; a disk that
    refuses. Then nothing is left behind. DependencyError: a hub name, and huggingface_hub is missing.
    """
    from fathom.errors import CheckpointError
    from fathom.hub.huggingface import local_folder, pretrained, whole_or_absent
    from fathom.load import TOKENIZER, recipe_for, words_of
    from fathom.model.cost import Cost

    _refuse_taken(run)
    found = pretrained(local_folder(path))
    tokenizer = words_of(found)
    recipe = recipe_for(found, run / TOKENIZER, run)
    cost = Cost(found.config)
    facts = {"imported": path, "family": found.family}

    def write(hidden: Path) -> None:
        from fathom.config.text import dump
        from fathom.train.checkpoint import RunFolder
        from fathom.train.state import TrainState
        from fathom.version import __version__

        folder = RunFolder.create(hidden, {"fathom": __version__, **facts})
        folder.write("config.yaml", dump(recipe))
        tokenizer.save(hidden / TOKENIZER)
        try:
            folder.save(0, found.save, {}, {}, {"imported": True, "state": TrainState().to_dict()})
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):  # told of the run that was asked for, not of a hidden folder
                raise error.__cause__ from None
            raise

    whole_or_absent(run, write)
    total = cost.parameters() + cost.mtp_parameters()
    return Imported(found.family, total, cost.vocabulary, found.tokenizer is not None)


def _refuse_taken(run: Path) -> None:
    """CheckpointError before a large folder is read for nothing."""
    from fathom.errors import CheckpointError

    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise CheckpointError(f"{run} is there already; choose another place, or delete it first")
