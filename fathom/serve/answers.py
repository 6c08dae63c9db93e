"""What is answered: the shapes, for /openapi.json and for tests. Answers are written without them, for speed; a test
holds the two together."""

from __future__ import annotations

from typing import Literal

from fathom.serve.fields import Wire

Finish = Literal["stop", "length"]


class ErrorDetail(Wire):
    """What went wrong."""

    message: str
    """In words: what was given, what is possible."""
    type: str
    """invalid_request_error, authentication_error, rate_limit_error or server_error."""
    param: str | None
    """The field of the request."""
    code: str
    """For programs."""


class ErrorBody(Wire):
    """OpenAI's shape of an error."""

    error: ErrorDetail


class PromptDetails(Wire):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Whose keys and values were there already, from an earlier prompt that began alike."""


class CompletionDetails(Wire):
    """Of the answer's tokens."""

    accepted_prediction_tokens: int
    """That an MTP depth had proposed and the model agreed with."""
    rejected_prediction_tokens: int
    """That an MTP depth proposed in vain."""


class Usage(Wire):
    """Tokens. Each prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class LayerOfToken(Wire):
    """Where one MoE layer sent a token."""

    layer: int
    experts: list[int]
    """Heaviest first."""
    weights: list[float]
    """Factors on the experts' outputs."""


class RoutingOfToken(Wire):
    """The experts of the pass that chose a token."""

    token_id: int
    token: str
    draft: bool
    """An MTP depth had proposed it, and the model agreed."""
    layers: list[LayerOfToken]


class PromptToken(Wire):
    """A token that might stand at a place of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptTable = dict[str, PromptToken] | None


class Logprobs(Wire):
    """Log-probabilities under the model itself, before temperature and cuts; a place each."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null: nothing stands before it."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where in the text the token begins."""


class CompletionChoice(Wire):
    """One answer, or what a chunk of a stream adds to it."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Finish | None
    """stop: the end of text, a stop text or token; length: max_tokens or the window. null: there is more to come."""
    stop_reason: str | int | None
    """The stop text or token (vLLM); null for the end of text."""
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[PromptTable] | None = None
    routing: list[RoutingOfToken] | None = None


class Completion(Wire):
    """An answer to /v1/completions; a chunk of its stream has the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    """Unix time, seconds."""
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Wire):
    """A token that might have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Wire):
    """A token of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    """UTF-8; empty for special tokens."""
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Wire):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Wire):
    """What the assistant said."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class Delta(Wire):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(Wire):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    routing: list[RoutingOfToken] | None = None


class ChatCompletion(Wire):
    """An answer to /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[PromptTable] | None = None


class ChunkChoice(Wire):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    routing: list[RoutingOfToken] | None = None


class ChatChunk(Wire):
    """A chunk of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class Generated(Wire):
    """An answer to /generate."""

    generated_text: str
    """The continuation, without the prompt."""


class Tokens(Wire):
    """An answer to /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Wire):
    """An answer to /detokenize."""

    prompt: str


class TokenizerInfo(Wire):
    """An answer to /tokenizer_info."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    """Tokens of prompt and answer together."""
    eos_token: str
    bos_token: str | None
    pad_token: str
    chat_template: str
    """In Jinja."""


class ModelDetails(Wire):
    """What Fathom knows about a model."""

    step: int
    """Of the training whose weights these are; 0 for a Hugging Face folder."""
    parameters: int
    active_parameters: int
    """That one token uses."""
    cache_bytes_per_token: int
    num_hidden_layers: int
    moe_layers: list[int]
    """Counted from 0."""
    n_routed_experts: int
    num_experts_per_tok: int
    num_nextn_predict_layers: int
    """MTP depths."""
    dtype: str
    device: str
    quantization: str | None
    val_loss: float | None
    """Nats a token."""


class Model(Wire):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fathom"
    root: str
    parent: None = None
    max_model_len: int
    """Tokens of prompt and answer together."""
    fathom: ModelDetails


class Models(Wire):
    """All that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(Wire):
    """Whether the process does its work."""

    status: Literal["ok", "failed"]
    reason: str | None = None


class Ready(Wire):
    """Whether the model answers."""

    status: Literal["ready", "not ready"]
    reason: str | None = None
