"""`fathom verify`: the certificate of a run, and the same model in other people's engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from fathom.cli.sampling import RunArgument

if TYPE_CHECKING:
    from rich.table import Table

    from fathom.verify.certificate import Check
    from fathom.verify.engines import Parity

EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME[=PYTHON]",
        help="transformers, llama.cpp, mlx-lm, vllm or all; PYTHON is the interpreter that has it. May be repeated.",
    ),
]


def command(
    run: RunArgument,
    engine: EngineOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Certify a run: routing, absorbed attention, caches, generation, MTP and cost formulas, with measured errors.

    Exit code 1 when something does not hold. Example: fathom verify runs/demo --engine all
    """
    import json

    from fathom.load import load
    from fathom.tokenizer.ids import is_of_ids
    from fathom.verify.certificate import certify
    from fathom.verify.engines import chosen, parities

    engines = chosen(engine) if engine else []
    opened = load(run)
    checks = certify(opened.model, opened.tokenizer)
    if not json_:
        show_checks(checks, f"{opened.path} after step {opened.step}")
    words = None if is_of_ids(opened.tokenizer) else opened.tokenizer
    told = list(watched(parities(opened.model, words, engines), len(engines)))
    passed = all(check.passed for check in checks) and all(parity.passed for parity in told)
    if json_:
        facts = {
            "run": str(opened.path),
            "step": opened.step,
            "passed": passed,
            "checks": [check.facts() for check in checks],
            "engines": [parity.facts() for parity in told],
        }
        print(json.dumps(facts))
    else:
        if told:
            show_engines(told)
        print("Everything holds." if passed else "NOT everything holds.")
    if not passed:
        raise typer.Exit(1)


def watched(found: Iterable[Parity], count: int) -> Iterable[Parity]:
    """The same, with a line on the terminal while engines are at work."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = not count or not console.is_terminal
    return track(found, "asking engines", total=count, console=console, transient=True, disable=quiet)


def show_checks(checks: Iterable[Check], title: str) -> None:
    """The certificate as a table for the terminal."""
    table = _table("", "what must hold", "error", "on")
    for check in checks:
        table.add_row(_mark(check.passed), check.name, f"{check.error:.1e}" if check.error else "0", check.said)
    _print(title, table)


def show_engines(told: Iterable[Parity]) -> None:
    """The engines as a table for the terminal; what those said that did not run stands under it."""
    table, problems = _table("", "engine", "same greedy tokens", "largest logprob error"), []
    for parity in told:
        if parity.problem is not None:
            table.add_row(_mark(None if parity.passed else False), parity.engine, "-", "-")
            problems.append(f"{parity.engine}: {parity.problem}")
            continue
        tie = ", then a tie" if parity.tied else ""
        error = "-" if parity.error is None else f"{parity.error:.1e}"
        same = f"{parity.same} of {parity.tokens}{tie}"
        table.add_row(_mark(parity.passed), f"{parity.engine} {parity.version}", same, error)
    _print("The same model in other engines", table)
    for problem in problems:
        print(problem)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD)
    for column in table.columns[:-1]:
        column.no_wrap = True
    return table


def _print(title: str, table: Table) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    console.print(Text(title, style="bold"))
    console.print(table)


def _mark(passed: bool | None) -> str:
    return "-" if passed is None else "ok" if passed else "NO"
