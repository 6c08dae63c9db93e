"""`fathom generate`: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fathom.cli.sampling import (
    DeviceOption,
    DtypeOption,
    Greedy,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    RunArgument,
    Seed,
    Speculative,
    Temperature,
    TopK,
    TopP,
    generator_of,
    sampling,
    say,
)


def command(
    run: RunArgument,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The text to continue; - reads it from stdin, less a last line break.")
    ],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    greedy: Greedy = False,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given again.")] = None,
    speculative: Speculative = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Continue a prompt; the continuation comes on stdout, token by token.

    Example: fathom generate runs/demo --prompt "The state of the Union" --max-tokens 60
    """
    import json
    import time

    from fathom.load import load
    from fathom.log import log

    params = sampling(
        greedy=greedy, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens,
        min_p=min_p, repetition_penalty=repetition_penalty, stop=tuple(stop or ()),
    )  # fmt: skip
    text = from_stdin() if prompt == "-" else prompt
    opened = load(run, device, dtype)
    generator = generator_of(opened, speculative)
    answer = generator.begin(generator.request(text, params))
    started = time.perf_counter()
    for output in generator.run(answer):
        if not json_:
            say(output.text)
    seconds = time.perf_counter() - started
    done = answer.completion()
    speed = len(done.tokens) / seconds
    if json_:
        facts = {
            "run": str(opened.path),
            "step": opened.step,
            "prompt": text,
            "text": done.text,
            "prompt_tokens": len(done.prompt_ids),
            "tokens": len(done.tokens),
            "finish_reason": done.finish_reason,
            "stop_reason": done.stop_reason,
            "seed": params.seed,
            "seconds": seconds,
            "tokens_per_second": speed,
        }
        print(json.dumps(facts | ({"drafted": done.drafted, "accepted": done.accepted} if speculative else {})))
        return
    say("", end="\n")
    drafts = f"; {done.accepted} of {done.drafted} drafts accepted" if speculative else ""
    chance = "" if params.greedy else f"; --seed {params.seed}"
    log.info("%d tokens, %.0f a second (%s)%s%s", len(done.tokens), speed, done.finish_reason, drafts, chance)


def from_stdin() -> str:
    """What was piped in, less one line break at its end. RequestError: it is not UTF-8."""
    from fathom.errors import RequestError

    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"What came through stdin is not UTF-8 text: {error}") from None
    return text.removesuffix("\n").removesuffix("\r")
