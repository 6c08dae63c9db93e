"""The options that `fathom generate` and `fathom chat` share, and how they become `SamplingParams`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fathom.generate.generator import Generator
    from fathom.generate.request import SamplingParams
    from fathom.load import Run

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder, RUN@best, RUN@500 for a step's checkpoint, or an exported folder."
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="At most so many tokens; the model's window may hold fewer.")]
Temperature = Annotated[
    float | None, typer.Option(help="Divides the logits: lower is more predictable, 0 is greedy (default: 0.8).")
]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the likeliest tokens that make up this probability (default: 0.95).")
]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens that were there already become less likely.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text; without one it is drawn and told.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the likeliest token each time.")]
Speculative = Annotated[
    bool, typer.Option("--speculative", help="Let the MTP depths draft and the model verify: the same, perhaps faster.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]


def sampling(
    *, greedy: bool, temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None, **rest: Any
) -> SamplingParams:
    """Checked parameters, with a seed that can be typed again. RequestError: impossible, or contradictory."""
    import secrets

    from fathom.errors import RequestError
    from fathom.generate.request import SamplingParams

    if greedy:
        given = [
            n for n, v in (("--temperature", temperature), ("--top-k", top_k), ("--top-p", top_p)) if v is not None
        ]
        if given:
            raise RequestError(f"--greedy leaves nothing to chance, so {' and '.join(given)} cannot be given with it.")
        temperature, top_p = 0.0, 1.0
    return SamplingParams(
        temperature=0.8 if temperature is None else temperature,
        top_p=0.95 if top_p is None else top_p,
        top_k=top_k,
        seed=secrets.randbelow(10**6) if seed is None else seed,
        **rest,
    )


def generator_of(run: Run, speculative: bool) -> Generator:
    """The plain loop, or the speculative one. RequestError: the model has no MTP depths."""
    from fathom.generate.generator import Generator
    from fathom.generate.speculative import SpeculativeGenerator

    return (SpeculativeGenerator if speculative else Generator)(run.model, run.tokenizer)


def say(text: str, end: str = "") -> None:
    """Text on stdout at once; characters that the terminal cannot show become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + end)
    sys.stdout.flush()
