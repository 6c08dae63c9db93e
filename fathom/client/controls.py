"""The controls that both tabs share, and how they become `Sampling`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from fathom.client.http import Sampling
from fathom.client.wire import Model
from fathom.errors import RequestError

LONGEST = 2048  # the most that the slider offers
DEFAULT = Sampling()


@dataclass(frozen=True)
class Controls:
    """The components. The first five are the page's since its first day."""

    max_length: gr.Slider
    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    greedy: gr.Checkbox
    seed: gr.Textbox
    experts: gr.Checkbox

    @classmethod
    def place(cls) -> Controls:
        """Put them where Gradio is building."""
        controls = cls(
            max_length=gr.Slider(1, 512, DEFAULT.max_length, step=1, label="Max length", info="new tokens, at most"),
            temperature=gr.Slider(0.05, 2, DEFAULT.temperature, step=0.05, label="Temperature", info="lower is surer"),
            top_p=gr.Slider(0.05, 1, DEFAULT.top_p, step=0.05, label="Top-p", info="the likeliest that make up p"),
            top_k=gr.Slider(0, 200, DEFAULT.top_k, step=1, label="Top-k", info="the k likeliest; 0: all"),
            greedy=gr.Checkbox(False, label="Greedy", info="the likeliest token each time"),
            seed=gr.Textbox("", label="Seed", placeholder="drawn anew", max_lines=1, info="same seed, same text"),
            experts=gr.Checkbox(True, label="Experts", info="draw which each token used"),
        )
        by_chance = [controls.temperature, controls.top_p, controls.top_k, controls.seed]
        controls.greedy.change(
            lambda greedy: [gr.update(interactive=not greedy)] * len(by_chance),
            controls.greedy,
            by_chance,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        return controls

    @property
    def all(self) -> set[Any]:
        """As inputs of an event."""
        return {self.max_length, self.temperature, self.top_p, self.top_k, self.greedy, self.seed, self.experts}

    def sampling(self, values: Mapping[Any, Any]) -> Sampling:
        """What they are set to. Without a seed one is drawn, so that it can be told and typed again. RequestError: the
        seed is no number."""
        seed = str(values[self.seed] or "").strip()
        greedy = bool(values[self.greedy])

        def held(slider: gr.Slider, default: float) -> float:
            return default if values[slider] is None else float(values[slider])  # a field may be emptied

        return Sampling(
            max_length=max(1, round(held(self.max_length, DEFAULT.max_length))),
            temperature=0.0 if greedy else max(0.01, held(self.temperature, DEFAULT.temperature)),
            top_p=1.0 if greedy else min(1.0, max(0.01, held(self.top_p, DEFAULT.top_p))),
            top_k=0 if greedy else max(0, round(held(self.top_k, DEFAULT.top_k))),
            seed=None if greedy else _whole(seed) if seed else secrets.randbelow(10**6),
        )

    def fit(self, model: Model | None) -> tuple[Any, Any]:
        """(max length, experts) as the model allows them."""
        window = model.max_model_len if model else None
        length = gr.skip() if window is None else gr.update(maximum=max(2, min(window - 1, LONGEST)))
        return length, gr.skip() if model is None else gr.update(visible=model.routes)


def _whole(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        raise RequestError(
            f"The seed is {text!r}; possible is a whole number, or nothing: one is drawn then."
        ) from None
    if not -(2**63) <= seed < 2**63:
        raise RequestError(f"The seed is {text}; possible are the whole numbers of 64 bits.")
    return seed
