"""`fathom eval`: how well a run predicts text that it has not seen. The arithmetic is evaluate/loss.py's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fathom.cli.sampling import DeviceOption, DtypeOption, RunArgument

if TYPE_CHECKING:
    from fathom.batch import Batch
    from fathom.evaluate.loss import Measured
    from fathom.load import Run

Split = Literal["train", "validation", "test"]


def command(
    run: RunArgument,
    text: Annotated[
        list[Path] | None, typer.Option(help="A UTF-8 text file to measure, instead of the run's own; may be repeated.")
    ] = None,
    split: Annotated[Split | None, typer.Option(help="Which part of the run's own text (default: validation).")] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="At most so many batches (default: all).")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row (default: training.sequence_length).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a batch (default: training.batch_size).")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Measure loss, perplexity a token and a word, bits per byte, MTP acceptance and the balance of experts.

    Example: fathom eval runs/demo@best --split test
    """
    import json
    import time

    from fathom.errors import RequestError
    from fathom.load import load

    if text and split:
        raise RequestError(
            f"--text brings its own text, so --split {split} means nothing with it; give one or the other."
        )
    documents = [read(path) for path in text or ()]
    opened = load(run, device, dtype)
    started = time.perf_counter()
    if text:
        found = evaluated_text(opened, documents, batches, sequence_length, batch_size)
        title = ", ".join(map(str, text))
    else:
        found = evaluated(opened, split or "validation", batches, sequence_length, batch_size)
        title = f"the {split or 'validation'} split"
    seconds = time.perf_counter() - started
    if not json_:
        show(found, f"{opened.path} after step {opened.step}, on {title}")
        return
    source = {"text": [str(path) for path in text]} if text else {"split": split or "validation"}
    facts = {"run": str(opened.path), "step": opened.step, **source, **found.facts(), "seconds": seconds}
    print(json.dumps(facts | {"tokens_per_second": found.tokens / seconds}))


def evaluated(
    run: Run,
    split: Split,
    batches: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
) -> Measured:
    """A run on a split of its own data; lengths and rows are its training's unless given."""
    from fathom.data.corpus import has_split, open_data
    from fathom.errors import DataError

    rows, length = shape(run, sequence_length, batch_size)
    if not has_split(run.config.data, split):
        raise DataError(
            f"The run held no {split} text out: data.{split}_fraction was 0 and no source brings its own. "
            "Take another --split, or give --text FILE."
        )
    corpus = open_data(run.config.data, run.tokenizer, split)
    return _measured(run, corpus.evaluation_batches(batch_size=rows, sequence_length=length, limit=batches))


def evaluated_text(
    run: Run, documents: Iterable[str], batches: int | None, sequence_length: int | None, batch_size: int | None
) -> Measured:
    """A run on texts; every one begins and ends as a document does in training."""
    from fathom.evaluate.text import text_batches

    rows, length = shape(run, sequence_length, batch_size)
    tokenizer = run.tokenizer
    every = (text_batches(tokenizer.encode(text), tokenizer.eos_id, length, rows) for text in documents)
    return _measured(run, islice(chain.from_iterable(every), batches))


def _measured(run: Run, batches: Iterable[Batch]) -> Measured:
    from fathom.evaluate.loss import measure

    return measure(run.model, _told(batches), run.tokenizer.token_bytes)


def _told(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same, with a line on the terminal that counts them while they are read."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(batches, "measuring", console=console, transient=True, disable=not console.is_terminal)


def shape(run: Run, sequence_length: int | None, batch_size: int | None) -> tuple[int, int]:
    """(rows, tokens of a row). RequestError: rows longer than the model's window."""
    from fathom.errors import RequestError

    training, window = run.config.training, run.config.model.max_position_embeddings
    length = sequence_length or training.sequence_length
    if length > window:
        raise RequestError(
            f"--sequence-length is {length}, but the model's window holds {window} tokens; give no more."
        )
    return batch_size or training.batch_size, length


def read(path: Path) -> str:
    """A text file as training reads one. DataError: it is missing, empty or no UTF-8 text."""
    from fathom.data.sources import Text, read_text
    from fathom.errors import DataError

    text = "".join(read_text(path, Text(kind="text", path=str(path))))
    if not text.strip():
        raise DataError(f"{path} is empty. Give a file with text.")
    return text


def show(found: Measured, title: str) -> None:
    """The figures as two tables for the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    page = Table(box=box.SIMPLE_HEAD, show_header=False)
    page.add_column()
    page.add_column(justify="right")
    for row in _rows(found):
        page.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(title, style="bold"))
    console.print(page)
    if not found.routing:
        return
    experts = Table("layer", "MaxVio", "entropy", "dead", box=box.SIMPLE_HEAD)
    for column in experts.columns:
        column.justify = "right"
    for layer in found.routing:
        experts.add_row(
            str(layer.layer), f"{layer.max_vio:.3f}", f"{layer.entropy:.3f}", f"{layer.dead} of {len(layer.counts)}"
        )
    console.print(Text("Balance of experts", style="bold"))
    console.print(experts)


def _rows(found: Measured) -> Iterator[tuple[str, str]]:
    def shown(value: float | None, form: str = ",.3f") -> str:
        return "-" if value is None else format(value, form)

    yield "loss, nats a token", shown(found.loss, ".4f")
    yield "perplexity a token", shown(found.perplexity)
    yield "perplexity a word", shown(found.word_perplexity)
    yield "bits per byte", shown(found.bits_per_byte, ".4f")
    yield "tokens", f"{found.tokens:,}"
    if found.bytes is not None:
        yield "bytes", f"{found.bytes:,}"
        yield "words", f"{found.words:,}"
    for depth, ahead in enumerate(found.mtp, start=1):
        name = f"MTP depth {depth}" if len(found.mtp) > 1 else "MTP"
        yield f"{name}, nats a token", shown(ahead.loss, ".4f")
        yield f"{name}, acceptance", shown(ahead.acceptance, ".1%")
