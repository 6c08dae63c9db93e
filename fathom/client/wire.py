"""What the API says, as far as the page reads it. Fields that are not known are ignored: the server may be newer, or
another one that speaks OpenAI's shapes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fathom.knobs import Many


class Told(BaseModel):
    """The lenient, frozen base of what a server tells."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, protected_namespaces=())


class LayerRouting(Told):
    """Where one MoE layer sent one token."""

    layer: int
    """Counted from 0."""
    experts: Many[int]
    weights: Many[float]
    """Of the experts' outputs, in their order."""


class RoutedToken(Told):
    """One token of an answer, and what it went through."""

    token_id: int
    token: str
    """Its text alone; half a character is U+FFFD."""
    draft: bool = False
    """MTP had proposed it, and the model agreed."""
    layers: Many[LayerRouting] = ()


class PromptDetails(Told):
    """Of usage."""

    cached_tokens: int | None = None


class AnswerDetails(Told):
    """Of usage."""

    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class Usage(Told):
    """What a request cost, in tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: AnswerDetails | None = None


class Delta(Told):
    """What a chunk of a chat adds."""

    content: str | None = None


class Choice(Told):
    """What a chunk adds to the answer: `text` of a completion, `delta` of a chat."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    routing: Many[RoutedToken] | None = None


class Problem(Told):
    """Why there is no answer, or no more of it."""

    message: str = ""
    code: str | None = None


class Chunk(Told):
    """An event of a stream."""

    choices: Many[Choice] = ()
    usage: Usage | None = None
    error: Problem | None = None

    def piece(self) -> Piece:
        """What it adds; the page asks for one choice only."""
        choice = self.choices[0] if self.choices else Choice()
        text = choice.text or (choice.delta.content if choice.delta else None) or ""
        return Piece(text=text, routing=choice.routing or (), finish_reason=choice.finish_reason, usage=self.usage)


class Piece(Told):
    """A piece of an answer. usage stands in the last one, finish_reason (`stop`, `length`) at the end of the text.
    left_out: turns of the conversation that the model was not shown, since its window is full."""

    text: str = ""
    left_out: int = 0
    routing: Many[RoutedToken] = ()
    finish_reason: str | None = None
    usage: Usage | None = None


class Details(Told):
    """What Fathom's own API tells about a model."""

    step: int | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    cache_bytes_per_token: int | None = None
    num_hidden_layers: int | None = None
    moe_layers: Many[int] = ()
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    num_nextn_predict_layers: int = 0
    dtype: str | None = None
    device: str | None = None
    quantization: str | None = None
    val_loss: float | None = None
    """Nats a token."""


class Model(Told):
    """A model that is served."""

    id: str
    max_model_len: int | None = None
    """Tokens of prompt and answer together."""
    fathom: Details | None = None
    """None: another server, which is asked for OpenAI's fields only."""

    @property
    def routes(self) -> bool:
        """Whether the server can tell which experts a token used."""
        return self.fathom is not None and bool(self.fathom.moe_layers)


class Models(Told):
    """All that are served."""

    data: Many[Model] = Field(default=())
