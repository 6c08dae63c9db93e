"""`fathom data`: make the token shards of a configuration before it is trained, and count them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fathom.recipe import RunConfig


def command(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run, e.g. configs/laptop.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ..., laid over the file.", metavar="[KEY=VALUE]...")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Prepare the token shards of a configuration and count them. Training finds them in the cache (FATHOM_CACHE).

    Example: fathom data configs/laptop.yaml
    """
    from fathom.recipe import load_config

    found = facts(load_config(config, overrides or ()))
    if json_:
        import json

        print(json.dumps({"config": str(config), **found}))
    else:
        show(str(config), found)


def facts(run: RunConfig) -> dict[str, Any]:
    """The shards of every source and split, made where they were not; sizes in bytes."""
    from fathom.data.corpus import training_texts
    from fathom.data.prepare import has_split, prepare
    from fathom.data.sources import SPLITS
    from fathom.places import cache_folder
    from fathom.tokenizer.train import build

    tokenizer = build(run.tokenizer, lambda: training_texts(run.data))
    rows = []
    made = set()  # what is held out is made together with the training text
    for source in run.data.datasets:
        for split in SPLITS:
            if not has_split(source, split, run.data.fractions):
                continue
            done = prepare(source, split, run.data.fractions, tokenizer, run.data.offline)
            shards = done.shards
            if done.made:
                made.add(shards.folder)
            rows.append(
                {
                    "source": shards.name,
                    "split": split,
                    **vars(shards.totals),
                    "bytes_on_disk": shards.size_on_disk,
                    "made": shards.folder in made,
                    "folder": str(shards.folder),
                }
            )
    return {"cache": str(cache_folder()), "vocab_size": tokenizer.vocab_size, "splits": rows}


def show(title: str, found: dict[str, Any]) -> None:
    """A row for each source and split."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    page = Table(
        box=box.SIMPLE_HEAD,
        title=f"The data of {title}",
        title_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),
    )
    page.add_column("source", overflow="fold", min_width=8)
    page.add_column("split", no_wrap=True)
    for name in ("documents", "tokens", "bytes", "words", "MB"):
        page.add_column(name, justify="right", no_wrap=True)
    page.add_column("", no_wrap=True)
    for row in found["splits"]:
        page.add_row(*_cells(row))
    console = Console(highlight=False)
    console.print(page)
    console.print(
        f"{found['vocab_size']:,} tokens in the vocabulary; MB of shards are on disk, in {found['cache']}",
        soft_wrap=True,
    )


def _cells(row: dict[str, Any]) -> Sequence[str]:
    counts = [f"{row[key]:,}" for key in ("documents", "tokens", "bytes", "words")]
    return [
        row["source"],
        row["split"],
        *counts,
        f"{row['bytes_on_disk'] / 1e6:,.1f}",
        "made" if row["made"] else "cached",
    ]
