"""The page: components, and what happens when something is pressed. It knows the API by `http.py` only."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from time import monotonic
from typing import Any

import gradio as gr

from fathom.client.answer import Reading
from fathom.client.controls import Controls
from fathom.client.http import Api, Refused, Sampling
from fathom.client.pieces import card, continuation, conversation, header, notice, obstacle, progress
from fathom.client.routing import draw
from fathom.client.status import Status, Watch
from fathom.client.style import SCRIPT
from fathom.client.wire import Model, Piece
from fathom.errors import RequestError

EVERY = 4.0  # seconds between two looks at the API
REDRAW = 0.5  # seconds between two drawings of the routing, at least
PROMPTS = (
    "The state of the Union",
    "Our relations with other nations",
    "Explain quantum computing:",
    "Write a story about a space explorer:",
)
QUESTIONS = ("What is the state of the Union?", "How does machine learning work?", "What should Congress do?")
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
ONCE = {**QUIET, "trigger_mode": "once"}
Values = Mapping[Any, Any]  # component -> what it holds
Message = dict[str, str]
Update = tuple[Any, ...]  # a value for each output of an event


class Page:
    """The components and what they call. One object serves every open page; what belongs to one, Gradio keeps."""

    def __init__(self, api: Api) -> None:
        self.api, self.watch = api, Watch(api)
        self.readings: dict[str, Reading] = {}  # tab and session -> the answer that is being read
        with gr.Blocks(analytics_enabled=False, title="Fathom", fill_width=False) as self.blocks:
            self._place()
        # An answer waits for the API, which has a queue of its own; a second one here would only hide it.
        self.blocks.queue(default_concurrency_limit=None)

    # --- components

    def _place(self) -> None:
        head = _html(header(Status(), self.api.url))
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=320), gr.Tabs():
                with gr.Tab("Completion", id="completion"):
                    completion = _completion()
                with gr.Tab("Chat", id="chat"):
                    chat = _chat()
            with gr.Column(scale=3, min_width=260):
                self.controls = Controls.place()
                about = _html(card(None))
        self.routing = gr.HTML(draw((), None), js_on_load=SCRIPT, apply_default_css=False, elem_id="fathom-routing")
        self._connect_completion(**completion)
        self._connect_chat(**chat)
        seen = gr.State(None)
        outputs = [seen, head, about, self.controls.max_length, self.controls.experts]
        looks: dict[str, Any] = {"inputs": seen, "outputs": outputs, **QUIET}
        self.blocks.load(self.look, **looks)
        gr.Timer(EVERY).tick(self.look, **looks)

    def _connect_completion(
        self, prompt: gr.Textbox, answer: gr.HTML, facts: gr.HTML, send: gr.Button, stop: gr.Button
    ) -> None:
        self.prompt = prompt
        outputs = [answer, facts, self.routing, send, stop]
        gr.on([send.click, prompt.submit], self.complete, {prompt, *self.controls.all}, outputs, **ONCE)
        stop.click(self.stop_completion, queue=False, **QUIET)

    def _connect_chat(
        self, said: gr.Textbox, shown: gr.HTML, facts: gr.HTML, send: gr.Button, stop: gr.Button, clear: gr.Button
    ) -> None:
        self.said, self.history = said, gr.State([])
        outputs = [said, self.history, shown, facts, self.routing, send, stop, clear]
        gr.on([send.click, said.submit], self.say, {said, self.history, *self.controls.all}, outputs, **ONCE)
        stop.click(self.stop_chat, queue=False, **QUIET)
        clear.click(lambda: ([], conversation(()), ""), None, [self.history, shown, facts], queue=False, **QUIET)

    # --- whether the API is there

    async def look(self, seen: Status | None) -> Update:
        """(seen, header, card, max length, experts); skipped while nothing changes."""
        status = await self.watch.status()
        if status.model is None and seen is not None:
            status = Status(status.state, status.reason, seen.model)  # the card stays while the API is away
        if status == seen:
            return (gr.skip(),) * 5
        return status, header(status, self.api.url), card(status.model), *self.controls.fit(status.model)

    # --- answers

    async def complete(self, values: Values, request: gr.Request) -> AsyncGenerator[Update, None]:
        """(answer, facts, routing, send, stop), as it comes."""
        prompt = values[self.prompt] or ""

        def ask(model: Model, sampling: Sampling) -> AsyncGenerator[Piece, None]:
            return self.api.complete(prompt, sampling, model, bool(values[self.controls.experts]))

        async for text, facts, routing, running in self.follow(f"completion {request.session_hash}", ask, values):
            yield continuation(prompt, text, running), facts, routing, *_buttons(running)

    async def say(self, values: Values, request: gr.Request) -> AsyncGenerator[Update, None]:
        """(the box, history, conversation, facts, routing, send, stop, clear), as it comes. An answer of which
        nothing came leaves the conversation as it was, and the text in its box."""
        said, before = values[self.said] or "", list[Message](values[self.history])
        if not said.strip():
            yield *(gr.skip(),) * 5, *_buttons(False), gr.skip()
            return
        messages: list[Message] = [*before, {"role": "user", "content": said}]

        def ask(model: Model, sampling: Sampling) -> AsyncGenerator[Piece, None]:
            return self.fitting(messages, sampling, model, bool(values[self.controls.experts]))

        async for answer, facts, routing, running in self.follow(f"chat {request.session_hash}", ask, values):
            text = answer.strip()
            after = [*messages, {"role": "assistant", "content": text}] if text or running else before
            history = gr.skip() if running else after
            box = "" if after is not before else said
            clear = gr.update(interactive=not running)
            yield box, history, conversation(after, running), facts, routing, *_buttons(running), clear

    async def fitting(
        self, messages: list[Message], sampling: Sampling, model: Model, routing: bool
    ) -> AsyncGenerator[Piece, None]:
        """A chat's pieces; the oldest turns are left out as long as the window has no room for all. ApiError."""
        while True:
            try:
                async with aclosing(self.api.chat(messages, sampling, model, routing)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except Refused as error:
                if error.code != "context_length_exceeded" or len(messages) < 3:
                    raise
                messages = messages[2:]  # what was said, and its answer
                yield Piece(left_out=2)

    async def follow(
        self, key: str, ask: Callable[[Model, Sampling], AsyncGenerator[Piece, None]], values: Values
    ) -> AsyncGenerator[tuple[str, str, Any, bool], None]:
        """(text, facts, routing or skip, whether more will come) of an answer; the last one is complete."""
        try:
            sampling = self.controls.sampling(values)
        except RequestError as error:
            yield "", notice(str(error)), gr.skip(), False
            return
        status = await self.watch.status(now=True)
        if status.model is None:
            yield "", obstacle(status, self.api.url), gr.skip(), False
            return
        reading = self.readings[key] = Reading(ask(status.model, sampling))
        drawn = cost = 0.0
        try:
            yield "", progress(reading.answer, sampling.seed, True), gr.skip(), True
            async for answer in reading:
                routing = gr.skip()
                if answer.routing and (start := monotonic()) - drawn > max(REDRAW, 5 * cost):
                    routing = draw(answer.routing, status.model)
                    drawn, cost = monotonic(), monotonic() - start
                yield answer.text, progress(answer, sampling.seed, True), routing, True
            answer = reading.answer
            yield answer.text, progress(answer, sampling.seed, False), draw(answer.routing, status.model), False
        finally:
            if self.readings.get(key) is reading:
                del self.readings[key]

    def stop_completion(self, request: gr.Request) -> None:
        """End the answer; the connection to the API is closed at once."""
        self._stop(f"completion {request.session_hash}")

    def stop_chat(self, request: gr.Request) -> None:
        """The same in the other tab."""
        self._stop(f"chat {request.session_hash}")

    def _stop(self, key: str) -> None:
        if (reading := self.readings.get(key)) is not None:
            reading.stop()


def _buttons(running: bool) -> tuple[Any, Any]:
    return gr.update(visible=not running), gr.update(visible=running)


def _html(value: str) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, js_on_load=None)


def _go(label: str) -> dict[str, gr.Button]:
    """Send and stop; one of them is seen at a time."""
    return {
        "send": gr.Button(label, variant="primary", min_width=200),
        "stop": gr.Button("Stop", variant="stop", visible=False, min_width=200),
    }


def _completion() -> dict[str, Any]:
    """The components of the first tab."""
    prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, placeholder="A text to continue. Shift+Enter sends it.")
    with gr.Row():
        go = _go("Continue the text")
    gr.Examples([[text] for text in PROMPTS], prompt, label="Examples")
    return {"prompt": prompt, **go, "answer": _html(continuation("", "", False)), "facts": _html("")}


def _chat() -> dict[str, Any]:
    """The components of the second tab."""
    shown = gr.HTML(conversation(()), apply_default_css=False, js_on_load=None, max_height=460, autoscroll=True)
    facts = _html("")
    said = gr.Textbox(label="Your turn", lines=1, max_lines=8, placeholder="Say something. Enter sends it.")
    with gr.Row():
        go = _go("Send")
        clear = gr.Button("New conversation", min_width=160)
    gr.Examples([[text] for text in QUESTIONS], said, label="Examples")
    return {"said": said, "shown": shown, "facts": facts, **go, "clear": clear}
