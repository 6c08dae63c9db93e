"""What may be asked: OpenAI's bodies with vLLM's extensions.

Every field is honoured, or is `Neutral`: refused by name unless its value changes nothing. Fields that only label a
request (user, metadata, store, ...) are accepted and unused. `protocol.py` makes a `Request` of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from fathom.serve.fields import TAG, Neutral, Wire, whole, wholes

TOP = 20  # how many likeliest tokens may be told, as in vLLM and OpenAI's chat
MANY = 128  # OpenAI's largest n
STOPS = 16
TOKEN = {"x-token": True}  # /openapi.json gives such a number the vocabulary's size as its bound
PROMPT = {"x-prompt": True}  # such a list the window's
OUTPUT = {"x-output": True}  # such a number that of an answer's tokens, if the server has one
LEAST = {"x-least": True}  # and such a number what an answer may have at all

Natural = Annotated[int, Field(ge=0), BeforeValidator(whole)]
Least = Annotated[int, Field(ge=0, json_schema_extra=LEAST), BeforeValidator(whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(whole)]
FromMinusOne = Annotated[int, Field(ge=-1), BeforeValidator(whole)]
Length = Annotated[int, Field(ge=0, json_schema_extra=OUTPUT), BeforeValidator(whole)]
PositiveLength = Annotated[int, Field(ge=1, json_schema_extra=OUTPUT), BeforeValidator(whole)]
Likeliest = Annotated[int, Field(ge=0, le=TOP), BeforeValidator(whole)]
Choices = Annotated[int, Field(ge=1, le=MANY), BeforeValidator(whole)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(whole)]
TokenId = Annotated[int, Field(ge=0, json_schema_extra=TOKEN)]
Ids = Annotated[list[TokenId], BeforeValidator(wholes)]
TokenIds = Annotated[Ids, Field(min_length=1, json_schema_extra=PROMPT)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
BIASES = {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}
Biases = Annotated[dict[BiasKey, Bias], Field(max_length=1024), WithJsonSchema({**BIASES, "x-token-keys": True})]


def _one_or_many(value: Any) -> str:
    return f"{TAG}text" if isinstance(value, str) else f"{TAG}list"


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return f"{TAG}text"
    first = value[0] if isinstance(value, list) and value else None
    kinds = {str: "texts", int: "ids", float: "ids", list: "lists"}
    return TAG + kinds.get(type(first), "texts") if isinstance(value, list) else None


Stop = Annotated[
    Annotated[Text, Tag(f"{TAG}text")] | Annotated[list[Text], Field(max_length=STOPS), Tag(f"{TAG}list")],
    Discriminator(_one_or_many),
]
Prompt = Annotated[
    Annotated[str, Tag(f"{TAG}text")]
    | Annotated[list[str], Field(min_length=1, max_length=MANY), Tag(f"{TAG}texts")]
    | Annotated[TokenIds, Tag(f"{TAG}ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MANY), Tag(f"{TAG}lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="possible are a text, a list of texts, a list of token ids, a list of such lists",
    ),
]


def _only_with(field: str, kind: dict[str, Any], other: str, value: bool) -> dict[str, Any]:
    """What fields say about each other, in JSON schema: the one, if it is of a kind, needs a value of the other."""
    given = {"required": [field], "properties": {field: kind}}
    if value:
        return {"if": given, "then": {"required": [other], "properties": {other: {"const": True}}}}
    return {"if": given, "then": {"properties": {other: {"enum": [None, False]}}}}


STREAM_OPTIONS = _only_with("stream_options", {"type": "object"}, "stream", True)
PROMPT_LOGPROBS = _only_with("prompt_logprobs", {"type": "integer"}, "stream", False)
TOP_LOGPROBS = _only_with("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs", True)


class StreamOptions(Wire):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    """A last chunk without choices tells the usage of the whole request; in the others it is null."""
    continuous_usage_stats: bool | None = None
    """Every chunk tells the usage so far (vLLM)."""
    include_obfuscation: Annotated[Any, Neutral("Chunks are not padded with noise.", (False,))] = None


class Sampling(Wire):
    """What completions and chats have in common."""

    model: str | None = None
    """One of /v1/models; null: the one that is served."""
    temperature: float | None = Field(default=None, ge=0)
    """Divides the logits; 0 is greedy. Default 1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Only the fewest likeliest tokens that make up this probability. Default 1."""
    top_k: FromMinusOne | None = None
    """Only the k likeliest tokens; 0, -1 and null: all (vLLM)."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Only tokens at least so many times as likely as the likeliest (vLLM). Default 0."""
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    """Above 1: tokens of prompt and answer become less likely (vLLM). Default 1."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Taken from the logit of tokens that the answer has. Default 0."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """The same, times how often. Default 0."""
    logit_bias: Biases | None = None
    """Token id -> number added to its logit."""
    seed: Seed | None = None
    """Same seed, same text. Choice i of n has seed + i."""
    n: Choices | None = None
    """Answers to each prompt. Default 1."""
    stop: Stop | None = None
    """Texts that end the answer and are not part of it."""
    stop_token_ids: Ids | None = Field(default=None, max_length=1024)
    """Tokens that end the answer (vLLM)."""
    ignore_eos: bool | None = None
    """Go on after the end-of-text token (vLLM)."""
    min_tokens: Least | None = None
    """Nothing ends the answer before so many tokens (vLLM)."""
    prompt_logprobs: Likeliest | None = None
    """So many likeliest tokens at every place of the prompt (vLLM); not in streams."""
    truncate_prompt_tokens: FromMinusOne | None = None
    """Only the last k tokens of the prompt; -1: as many as the window holds beside one token; 0: all."""
    stream: bool | None = None
    """Send the answer as server-sent events, as it comes."""
    stream_options: StreamOptions | None = None
    """Only with stream."""
    return_routing: bool | None = None
    """Tell which experts every token of the answer went through (Fathom)."""
    return_token_ids: bool | None = None
    """Tell the token ids of prompt and answer (vLLM)."""
    return_tokens_as_token_ids: bool | None = None
    """Log-probabilities name tokens as token_id:17 (vLLM)."""

    user: str | None = None
    """Accepted, unused; so are the next five."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    service_tier: Annotated[Any, Neutral("There is one tier.", ("auto", "default"))] = None
    response_format: Annotated[Any, Neutral("Answers are free text.", ({"type": "text"},))] = None
    structured_outputs: Annotated[Any, Neutral("Answers are free text.")] = None
    guided_json: Annotated[Any, Neutral("Answers are free text.")] = None
    guided_regex: Annotated[Any, Neutral("Answers are free text.")] = None
    guided_choice: Annotated[Any, Neutral("Answers are free text.")] = None
    guided_grammar: Annotated[Any, Neutral("Answers are free text.")] = None
    use_beam_search: Annotated[Any, Neutral("Tokens are drawn one by one.", (False,))] = None
    length_penalty: Annotated[Any, Neutral("It belongs to beam search.", (1, 1.0))] = None
    include_stop_str_in_output: Annotated[Any, Neutral("What stops an answer is no part of it.", (False,))] = None
    skip_special_tokens: Annotated[Any, Neutral("Special tokens are no text.", (True,))] = None
    spaces_between_special_tokens: Annotated[Any, Neutral("Special tokens are no text.", (True, False))] = None
    allowed_token_ids: Annotated[Any, Neutral("Use logit_bias.")] = None
    bad_words: Annotated[Any, Neutral("Use logit_bias.", ([],))] = None
    logits_processors: Annotated[Any, Neutral("No code is run for a request.", ([],))] = None
    logprob_token_ids: Annotated[Any, Neutral("The likeliest tokens are told.", ([],))] = None
    truncation_side: Annotated[Any, Neutral("The last tokens are kept.", ("left",))] = None
    priority: Annotated[Any, Neutral("Requests are served in the order in which they came.", (0,))] = None
    request_id: Annotated[Any, Neutral("The header x-request-id names a request.")] = None
    cache_salt: Annotated[Any, Neutral("Prefixes are shared by all.")] = None
    kv_transfer_params: Annotated[Any, Neutral("There is one engine.")] = None
    vllm_xargs: Annotated[Any, Neutral("There are no extra arguments.", ({},))] = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"allOf": [STREAM_OPTIONS, PROMPT_LOGPROBS]})

    prompt: Prompt | None
    """A text, texts, token ids or lists of token ids; null or "": a new document."""
    max_tokens: Length | None = None
    """At most so many tokens; the window may hold fewer. 0 with echo: only the prompt. Default 16, or min_tokens."""
    logprobs: Likeliest | None = None
    """Log-probabilities of each token and of so many likeliest ones."""
    echo: bool | None = None
    """The answer begins with the prompt; with logprobs, its log-probabilities too."""
    add_special_tokens: bool | None = None
    """Add what the tokenizer's own template adds (such as a beginning-of-text token). Default: as the model was
    trained."""
    best_of: Annotated[Positive, WithJsonSchema({"const": 1})] | None = None
    """1, or n: no answer is made to be thrown away."""
    suffix: Annotated[Any, Neutral("Texts are continued, not filled in.", ("",))] = None
    prompt_embeds: Annotated[Any, Neutral("Prompts are texts or token ids.")] = None


class TextPart(Wire):
    """A piece of a message."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag(f"{TAG}text")] | Annotated[list[TextPart], Field(min_length=1), Tag(f"{TAG}list")],
    Discriminator(_one_or_many),
]


class MessageBody(Wire):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """developer means system."""
    content: Content
    """A text, or parts of type text, which are joined by line breaks."""
    name: Annotated[Any, Neutral("The template has no place for names.")] = None
    refusal: Annotated[Any, Neutral("The template has no place for it.")] = None
    audio: Annotated[Any, Neutral("The model reads text.")] = None
    annotations: Annotated[Any, Neutral("The template has no place for them.", ([],))] = None
    tool_calls: Annotated[Any, Neutral("The model calls no tools.", ([],))] = None
    function_call: Annotated[Any, Neutral("The model calls no functions.")] = None
    reasoning: Annotated[Any, Neutral("The template has no place for it.")] = None
    reasoning_content: Annotated[Any, Neutral("The template has no place for it.")] = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


Messages = Annotated[list[MessageBody], Field(min_length=1)]


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra={"allOf": [STREAM_OPTIONS, PROMPT_LOGPROBS, TOP_LOGPROBS]})

    messages: Messages
    """The conversation so far."""
    max_tokens: Length | None = None
    """The older name of max_completion_tokens."""
    max_completion_tokens: Length | None = None
    """At most so many tokens. Default: as many as the window holds."""
    logprobs: bool | None = None
    """Log-probabilities of each token."""
    top_logprobs: Likeliest | None = None
    """And of so many likeliest ones; only with logprobs."""
    add_generation_prompt: bool | None = None
    """End the prompt where the assistant begins to speak. Default true."""

    tools: Annotated[Any, Neutral("The model calls no tools.", ([],))] = None
    tool_choice: Annotated[Any, Neutral("The model calls no tools.", ("none", "auto"))] = None
    parallel_tool_calls: Annotated[Any, Neutral("The model calls no tools.", (True, False))] = None
    functions: Annotated[Any, Neutral("The model calls no functions.", ([],))] = None
    function_call: Annotated[Any, Neutral("The model calls no functions.", ("none", "auto"))] = None
    modalities: Annotated[Any, Neutral("The model writes text.", (["text"],))] = None
    audio: Annotated[Any, Neutral("The model writes text.")] = None
    prediction: Annotated[Any, Neutral("The model drafts by itself.")] = None
    reasoning_effort: Annotated[Any, Neutral("The model does not reason apart from its answer.", ("none",))] = None
    include_reasoning: Annotated[Any, Neutral("The model does not reason apart.", (True, False))] = None
    verbosity: Annotated[Any, Neutral("The model writes as it was trained.", ("medium",))] = None
    web_search_options: Annotated[Any, Neutral("Nothing is searched.")] = None
    echo: Annotated[Any, Neutral("An answer does not repeat the conversation.", (False,))] = None
    continue_final_message: Annotated[Any, Neutral("An answer is a new turn.", (False,))] = None
    add_special_tokens: Annotated[Any, Neutral("The template says what is added.", (False,))] = None
    documents: Annotated[Any, Neutral("The template has no place for them.", ([],))] = None
    chat_template: Annotated[Any, Neutral("The server's template is used.")] = None
    chat_template_kwargs: Annotated[Any, Neutral("The server's template is used.", ({},))] = None
    mm_processor_kwargs: Annotated[Any, Neutral("The model reads text.", ({},))] = None


class GenerateBody(Wire):
    """POST /generate: the plain door."""

    prompt: str
    """The text to continue."""
    max_length: PositiveLength | None = None
    """New tokens, at most. Default 200."""
    temperature: float | None = Field(default=None, ge=0)
    """Default 0.7."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Default 0.9."""
    top_k: Natural | None = None
    """Default 50; 0: all tokens."""
    seed: Seed | None = None
    """Same seed, same text."""


class TokenizeText(Wire):
    """A text to be tokenized."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    """Default: as completions have it."""
    return_token_strs: bool | None = None
    """Tell the text of every token too."""


class TokenizeChat(Wire):
    """A conversation to be tokenized."""

    model: str | None = None
    messages: Messages
    add_generation_prompt: bool | None = None
    """Default true."""
    return_token_strs: bool | None = None
    """Tell the text of every token too."""
    continue_final_message: Annotated[Any, Neutral("An answer is a new turn.", (False,))] = None
    add_special_tokens: Annotated[Any, Neutral("The template says what is added.", (False,))] = None
    chat_template: Annotated[Any, Neutral("The server's template is used.")] = None
    chat_template_kwargs: Annotated[Any, Neutral("The server's template is used.", ({},))] = None
    tools: Annotated[Any, Neutral("The model calls no tools.", ([],))] = None


class DetokenizeBody(Wire):
    """Token ids to be made text."""

    model: str | None = None
    tokens: Ids
    """Special tokens are written out by name."""
