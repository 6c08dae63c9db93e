from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "generate"))

from fathom.generate.request import SamplingParams
from fathom.serve.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    TokenizeChat,
    TokenizeText,
)
from fathom.serve.chat import PlainChat
from fathom.serve.failures import ApiError
from fathom.serve.fields import Neutral, Wire, read
from fathom.serve.protocol import Asked, Asker, Bounds
from fathom.tokenizer.train import byte

TOKENIZER = byte()
HI = [{"role": "user", "content": "hi"}]
LEAST: dict[type[Wire], dict[str, Any]] = {
    CompletionBody: {"prompt": "ab"},
    ChatBody: {"messages": HI},
    GenerateBody: {"prompt": "ab"},
    TokenizeText: {"prompt": "ab"},
    TokenizeChat: {"messages": HI},
    DetokenizeBody: {"tokens": [3]},
}


def asker(**bounds: Any) -> Asker:
    return Asker(TOKENIZER, PlainChat(TOKENIZER), Bounds(**{"window": 64, "vocabulary": 263, **bounds}))


def body(kind: type[Wire], /, **fields: Any) -> Any:
    return read(kind, json.dumps({**LEAST[kind], **fields}).encode())


def completion(bounds: dict[str, Any] | None = None, **fields: Any) -> Asked:
    return asker(**(bounds or {})).completion(body(CompletionBody, **fields), "id")


def chat(**fields: Any) -> Asked:
    return asker().conversation(body(ChatBody, **fields), "id")


def refused(act: Any, /, *arguments: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        act(*arguments, **fields)
    assert caught.value.status == 400
    return caught.value


FIELDS = [(model, name) for model in LEAST for name in model.model_fields]


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda v: getattr(v, "__name__", v))
def test_null_means_left_out(model: type[Wire], name: str) -> None:
    required = model.model_fields[name].is_required()
    if required and (model, name) != (CompletionBody, "prompt"):
        assert refused(body, model, **{name: None}).param == name
    else:
        assert getattr(body(model, **{name: None}), name) is None


NEUTRAL = [
    (model, name, each)
    for model in LEAST
    for name, field in model.model_fields.items()
    for each in field.metadata
    if isinstance(each, Neutral)
]


@pytest.mark.parametrize(("model", "name", "rule"), NEUTRAL, ids=lambda v: getattr(v, "__name__", str(v)[:20]))
def test_what_is_not_honoured_is_refused_by_name(model: type[Wire], name: str, rule: Neutral) -> None:
    for value in rule.values:
        assert getattr(body(model, **{name: value}), name) == value
    error = refused(body, model, **{name: {"something": "else"}})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert rule.why in error.message
    for stranger in (0, 1, 2, True, "other"):
        if not any(type(stranger) is type(v) and stranger == v for v in rule.values):
            assert refused(body, model, **{name: stranger}).param == name


@pytest.mark.parametrize(
    ("model", "fields", "param", "code", "words"),
    [
        (CompletionBody, {"temprature": 1}, "temprature", "unknown_parameter", "did you mean temperature?"),
        (CompletionBody, {"zzz": 1}, "zzz", "unknown_parameter", "possible are model"),
        (ChatBody, {"messages": [{**HI[0], "contnt": 1}]}, "messages.0.contnt", "unknown_parameter", "mean content"),
        (ChatBody, {"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use",
         "unknown_parameter", "did you mean include_usage?"),
        (ChatBody, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value", "'assistant'"),
        (ChatBody, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.0.content.0.type", "invalid_value", "'text'"),
        (ChatBody, {"messages": []}, "messages", "invalid_value", "at least 1"),
        (CompletionBody, {"temperature": -1}, "temperature", "invalid_value", "temperature is -1"),
        (CompletionBody, {"temperature": "1"}, "temperature", "invalid_type", "valid number"),
        (CompletionBody, {"max_tokens": 1.5}, "max_tokens", "invalid_type", "max_tokens is 1.5"),
        (CompletionBody, {"max_tokens": True}, "max_tokens", "invalid_type", "valid integer"),
        (CompletionBody, {"prompt": {}}, "prompt", "invalid_type", "a list of token ids"),
        (CompletionBody, {"prompt": []}, "prompt", "invalid_value", "at least 1"),
        (CompletionBody, {"prompt": [[]]}, "prompt.0", "invalid_value", "at least 1"),
        (CompletionBody, {"prompt": [1, "a"]}, "prompt.1", "invalid_type", "integer"),
        (CompletionBody, {"stop": [""]}, "stop.0", "invalid_value", "at least 1"),
        (CompletionBody, {"logprobs": 21}, "logprobs", "invalid_value", "logprobs is 21"),
        (CompletionBody, {"logit_bias": {"a": 1}}, "logit_bias.a.[key]", "invalid_value", "pattern"),
        (CompletionBody, {"n": 0}, "n", "invalid_value", "n is 0"),
        (GenerateBody, {"max_tokens": 3}, "max_tokens", "unknown_parameter", "did you mean max_length?"),
    ],
)  # fmt: skip
def test_mistakes_are_named(model: type[Wire], fields: dict[str, Any], param: str, code: str, words: str) -> None:
    error = refused(body, model, **fields)
    assert (error.param, error.code) == (param, code)
    assert words in error.message


@pytest.mark.parametrize(
    ("act", "fields", "param"),
    [
        (completion, {"best_of": 2}, "best_of"),
        (completion, {"stream_options": {}}, "stream_options"),
        (completion, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (completion, {"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
        (completion, {"min_tokens": 65, "max_tokens": 99}, "min_tokens"),
        (chat, {"min_tokens": 65}, "min_tokens"),
        (completion, {"prompt": [263]}, "prompt"),
        (completion, {"prompt": "x" * 64}, "prompt"),
        (completion, {"stop_token_ids": [263]}, "stop_token_ids"),
        (completion, {"logit_bias": {"263": 1}}, "logit_bias"),
        (completion, {"prompt": ["a"] * 65, "n": 2}, "n"),
        (chat, {"top_logprobs": 3}, "top_logprobs"),
        (chat, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        (chat, {"messages": [{"role": "user", "content": "x" * 64}]}, "messages"),
    ],
)
def test_what_fields_say_about_each_other(act: Any, fields: dict[str, Any], param: str) -> None:
    assert refused(act, **fields).param == param


@pytest.mark.parametrize(
    ("bounds", "fields", "param"),
    [
        ({"prompt": 3}, {"prompt": "abcd"}, "prompt"),
        ({"output": 5}, {"max_tokens": 6}, "max_tokens"),
        ({"choices": 3}, {"n": 4}, "n"),
    ],
)
def test_the_servers_own_bounds(bounds: dict[str, Any], fields: dict[str, Any], param: str) -> None:
    assert refused(completion, bounds, **fields).param == param


def test_the_default_length_makes_room_for_min_tokens() -> None:
    params = completion(min_tokens=20).requests[0].params
    assert (params.min_tokens, params.max_tokens) == (20, 20)


def test_defaults_keep_to_the_servers_own_bounds() -> None:
    assert completion({"output": 5}).requests[0].params.max_tokens == 5
    assert completion({"output": 50}).requests[0].params.max_tokens == 16
    assert asker(output=5).plain(body(GenerateBody), "id").requests[0].params.max_tokens == 5
    assert asker(output=5).conversation(body(ChatBody), "id").requests[0].params.max_tokens == 5


def test_every_option_reaches_the_sampler() -> None:
    options = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 4, "top_p": 0.75, "min_p": 0.125,
        "repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": -0.5, "seed": 3, "stop": ["x", "yz"],
        "stop_token_ids": [7], "logit_bias": {"5": -3}, "logprobs": 2, "ignore_eos": True, "prompt_logprobs": 3,
    }  # fmt: skip
    (request,) = completion(**options).requests
    assert request.params == SamplingParams.of({**options, "logit_bias": {5: -3.0}})
    assert completion(**{**options, "echo": True, "prompt_logprobs": 1}).requests[0].params.prompt_logprobs == 2


def test_defaults_are_openais() -> None:
    (request,) = completion().requests
    assert request.params == SamplingParams(max_tokens=16, temperature=1.0)
    assert not request.routing
    (request,) = chat().requests
    assert request.params == SamplingParams(max_tokens=None, temperature=1.0, stop=("\nUser:", "\nSystem:"))
    assert request.prompt_ids == tuple(TOKENIZER.encode("User: hi\nAssistant:"))
    (request,) = asker().plain(body(GenerateBody), "id").requests
    assert request.params == SamplingParams(max_tokens=200, temperature=0.7, top_p=0.9, top_k=50)


def test_prompts_in_every_shape() -> None:
    a, b = TOKENIZER.encode("ab"), TOKENIZER.encode("c")
    shapes: list[tuple[Any, list[list[int]]]] = [
        ("ab", [a]), (["ab", "c"], [a, b]), (a, [a]), ([a, b], [a, b]), ([1.0, 2], [[1, 2]]),
        ("", [[TOKENIZER.eos_id]]), (None, [[TOKENIZER.eos_id]]),
    ]  # fmt: skip
    for prompt, ids in shapes:
        assert [list(r.prompt_ids) for r in completion(prompt=prompt).requests] == ids
    asked = completion(prompt=["ab", a, "c"][::2], n=2, seed=2**62, echo=True)
    assert [r.params.seed for r in asked.requests] == [2**62, 2**62 + 1] * 2
    assert (asked.texts, asked.prompt_tokens, asked.n) == (("ab", "c"), 3, 2)


def test_prompts_are_cut_from_the_front() -> None:
    asked = completion(prompt="abcdef", truncate_prompt_tokens=2, echo=True)
    assert asked.requests[0].prompt_ids == tuple(TOKENIZER.encode("ef"))
    assert asked.texts == ("ef",)
    assert len(completion(prompt="x" * 99, truncate_prompt_tokens=-1).requests[0].prompt_ids) == 63
    assert len(completion(prompt="abc", truncate_prompt_tokens=0).requests[0].prompt_ids) == 3


def test_conversations() -> None:
    said = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": " c \n", "tool_calls": [], "refusal": None},
        {"role": "user", "content": "d"},
    ]
    (request,) = chat(messages=said).requests
    text = "System: be\nUser: a\nb\nAssistant: c\nUser: d\n"
    assert TOKENIZER.decode(request.prompt_ids) == text + "Assistant:"
    (request,) = chat(messages=said, add_generation_prompt=False, stop="x").requests
    assert TOKENIZER.decode(request.prompt_ids) == text
    assert request.params.stop == ("x", "\nUser:", "\nSystem:")
    assert chat(max_completion_tokens=5).requests[0].params.max_tokens == 5
    assert chat(logprobs=True).requests[0].params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).requests[0].params.logprobs == 4


def test_nothing_but_the_prompt() -> None:
    asked = completion(max_tokens=0, echo=True, logprobs=1)
    assert asked.silent
    assert asked.requests[0].params.max_tokens == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FIELDS), JSON)
def test_any_value_is_read_or_refused(place: tuple[type[Wire], str], value: Any) -> None:
    model, name = place
    with contextlib.suppress(ApiError):  # anything else that is raised fails
        found = body(model, **{name: value})
        if isinstance(found, CompletionBody):
            asker().completion(found, "id")
        elif isinstance(found, ChatBody):
            asker().conversation(found, "id")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[1]", b"3", b'{"prompt": NaN}', b'"x"', b"[" * 10**5])
def test_what_is_no_object(raw: bytes) -> None:
    error = refused(read, CompletionBody, raw)
    assert json.loads(error.content)["error"]["type"] == "invalid_request_error"


def test_half_a_surrogate_is_refused() -> None:
    error = refused(read, CompletionBody, b'{"prompt": "a\\ud800"}')
    assert json.loads(error.content)
    assert json.loads(refused(read, CompletionBody, b'{"prompt": "a", "x\\ud800": 1}').content)
