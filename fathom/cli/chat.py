"""`fathom chat`: talk to a run in the terminal."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from fathom.generate.generator import Generator
    from fathom.generate.request import Request, SamplingParams
    from fathom.tokenizer.chat import Message

HELP = """/reset   forget the conversation
/help    these lines
/quit    leave; so does Ctrl-D
Ctrl-C stops an answer."""
PLAIN = (
    "This is a base model: it was trained to continue text, not to follow instructions or to tell the truth.\n"
    "It sees a dialogue and writes its next lines. /help lists what else can be typed."
)


def command(
    run: RunArgument,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.1,
    seed: Seed = None,
    greedy: Greedy = False,
    speculative: Speculative = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Talk to a run in the terminal, or pipe lines into it: one turn a line.

    Example: fathom chat runs/demo --temperature 0.7
    """
    from fathom.load import load
    from fathom.log import log
    from fathom.tokenizer.chat import STOPS

    params = sampling(
        greedy=greedy, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens,
        min_p=min_p, repetition_penalty=repetition_penalty, stop=STOPS,
    )  # fmt: skip
    generator = generator_of(load(run, device, dtype), speculative)
    log.info("%s", PLAIN)
    talk(Chat(generator, params))


class Chat:
    """A conversation: what was said, and how the next answer is asked for."""

    def __init__(self, generator: Generator, params: SamplingParams) -> None:
        self.generator, self.params = generator, params
        self.messages: list[Message] = []
        self.turns = 0

    def reset(self) -> None:
        """Forget everything."""
        self.messages = []

    def answer(self, text: str) -> None:
        """Say something, and print the answer as it comes. Ctrl-C ends it, and what came is kept. RequestError: the
        text alone fills the window; the conversation is then as before."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            request = self.request()
        except BaseException:
            self.messages = before
            raise
        answer = self.generator.begin(request)
        said, quiet = "", True
        try:
            for output in self.generator.run(answer):
                piece = output.text.lstrip() if quiet else output.text
                quiet = quiet and not piece
                said += piece
                say(piece)
        except KeyboardInterrupt:
            pass
        say("", end="\n")
        self.messages.append({"role": "assistant", "content": said.rstrip()})
        self.turns += 1

    def request(self) -> Request:
        """The conversation as a request; oldest turns are dropped until an answer of max_tokens, or of half the window,
        has room. RequestError: what was said last is too long by itself."""
        from fathom.errors import RequestError
        from fathom.runtime.seed import stream
        from fathom.tokenizer.chat import render

        window = self.generator.model.config.max_position_embeddings
        room = min(self.params.max_tokens or window, window // 2)
        params = replace(self.params, seed=stream(self.params.seed or 0, "chat", self.turns))
        while True:
            request = self.generator.request(render(self.messages), params)
            if len(request.prompt_ids) + room <= window:
                return request
            if len(self.messages) == 1:
                break
            self.messages = self.messages[2:]  # what was said, and its answer
        raise RequestError(
            f"That is too long: with the template it is {len(request.prompt_ids)} tokens, and the model's window of "
            f"{window} has room for {window - room} beside an answer."
        )


def talk(chat: Chat) -> None:
    """Read lines until there are no more."""
    from fathom.errors import RequestError

    while (line := heard()) is not None:
        text = line.strip()
        if not text:
            continue
        if text == "/quit":
            return
        if text == "/reset":
            chat.reset()
            say("The conversation is forgotten.", end="\n")
        elif text == "/help":
            say(HELP, end="\n")
        elif text.startswith("/"):
            say(f"There is no {text.split()[0]}; possible are /reset, /help and /quit.", end="\n")
        else:
            try:
                chat.answer(text)
            except RequestError as error:
                say(str(error), end="\n")


def heard() -> str | None:
    """The next line; None at the end. A prompt is shown in a terminal only. Ctrl-C gives an empty line."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in input()
    try:
        return input("> " if terminal else "")
    except EOFError:
        if terminal:
            say("", end="\n")
        return None
    except KeyboardInterrupt:
        say("", end="\n")
        return ""
