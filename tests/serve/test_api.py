"""The routes over the real engine: what is answered is what the reference loop says, in the promised shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from served import NAME, VOCABULARY, WINDOW, Served, served

from fathom.generate.request import Completion, Request, SamplingParams
from fathom.serve import answers
from fathom.serve.bodies import CompletionBody
from fathom.serve.schema import up_to

GREEDY = {"temperature": 0, "ignore_eos": True}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as found:
        yield found
        assert found.idle()


def valid(model: type[BaseModel], found: Any) -> Any:
    """Hold an answer to its published shape."""
    model.model_validate_json(json.dumps(found))
    return found


def completion(server: Served, **body: Any) -> dict[str, Any]:
    reply = server.post("/v1/completions", {"prompt": "ab", "max_tokens": 7, **GREEDY, **body})
    assert reply.status == 200, reply.body
    return valid(answers.Completion, reply.json)


def chat(server: Served, **body: Any) -> dict[str, Any]:
    reply = server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 7, **GREEDY, **body})
    assert reply.status == 200, reply.body
    return valid(answers.ChatCompletion, reply.json)


def chunks(server: Served, path: str, model: type[BaseModel], **body: Any) -> list[Any]:
    reply = server.post(path, {"max_tokens": 7, **GREEDY, **body, "stream": True})
    assert reply.status == 200, reply.body
    return [valid(model, event) for event in reply.events]


def reference(server: Served, prompt: str | list[int], **options: Any) -> Completion:
    ids = server.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    params = SamplingParams.of({"max_tokens": 7, "temperature": 0.0, "ignore_eos": True, **options})
    return server.generator.complete(Request(tuple(ids), params))


# --- completions


def test_a_completion_is_the_reference_loops(server: Served) -> None:
    found = completion(server)
    (choice,) = found["choices"]
    wanted = reference(server, "ab")
    assert choice["text"] == wanted.text
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("length", None, None)
    assert (found["model"], found["object"]) == (NAME, "text_completion")
    assert found["usage"]["prompt_tokens"] == 2
    assert found["usage"]["completion_tokens"] == 7
    assert found["usage"]["total_tokens"] == 9


def test_prompts_in_batches_come_back_in_order(server: Served) -> None:
    prompts: list[Any] = ["ab", "the", "q", "zz"]
    ids = [server.tokenizer.encode(prompt) for prompt in prompts]
    for sent in (prompts, ids):
        found = completion(server, prompt=sent, n=2, seed=5, temperature=1.0)
        assert [c["index"] for c in found["choices"]] == list(range(8))
        for i, choice in enumerate(found["choices"]):
            assert choice["text"] == reference(server, prompts[i // 2], temperature=1.0, seed=5 + i % 2).text
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert found["usage"]["completion_tokens"] == 8 * 7


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 1},
        {"min_p": 0.02, "temperature": 1.3, "seed": 2, "repetition_penalty": 1.3},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5, "seed": 3, "temperature": 1.0},
        {"logit_bias": {"70": 100}},
        {"stop_token_ids": [70], "logit_bias": {"70": 20}, "min_tokens": 4},
    ],
)
def test_options_do_what_they_do_in_the_loop(server: Served, options: dict[str, Any]) -> None:
    (choice,) = completion(server, **options, return_token_ids=True)["choices"]
    bias = {int(token): value for token, value in options.get("logit_bias", {}).items()}
    wanted = reference(server, "ab", **{**options, "logit_bias": bias})
    assert choice["token_ids"] == wanted.token_ids
    assert choice["prompt_token_ids"] == server.tokenizer.encode("ab")
    assert (choice["text"], choice["finish_reason"]) == (wanted.text, wanted.finish_reason)
    assert choice["stop_reason"] == wanted.stop_reason


def test_stop_texts(server: Served) -> None:
    whole = completion(server, seed=4, temperature=1.0, max_tokens=40)["choices"][0]["text"]
    stop = whole[5:8]
    for sent in (stop, ["~~~~", stop]):
        (choice,) = completion(server, seed=4, temperature=1.0, max_tokens=40, stop=sent)["choices"]
        assert choice["text"] == whole[: whole.find(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_log_probabilities_in_the_legacy_shape(server: Served) -> None:
    (choice,) = completion(server, echo=True, logprobs=3)["choices"]
    wanted, told = reference(server, "ab", logprobs=3), choice["logprobs"]
    assert choice["text"] == "ab" + wanted.text
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == 9
    assert told["tokens"][:2] == ["a", "b"]
    assert told["token_logprobs"][2:] == pytest.approx([o.logprob for o in wanted.tokens], abs=1e-4)
    second = server.generator.complete(
        Request(tuple(server.tokenizer.encode("a")), SamplingParams(max_tokens=1, logprobs=263, temperature=0.0))
    )
    table = dict(second.tokens[0].top_logprobs)
    assert told["token_logprobs"][1] == pytest.approx(table[server.tokenizer.encode("b")[0]], abs=1e-4)
    for token, value, top in zip(told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
        assert top[token] == value, "the token itself is always in the table"
        assert len(top) in (3, 4)
    assert told["text_offset"][:3] == [0, 1, 2]
    whole = [choice["text"][a:b] for a, b in zip(told["text_offset"], [*told["text_offset"][1:], None], strict=True)]
    assert "".join(whole) == choice["text"]


def test_tokens_that_are_no_text_are_spelled_apart(server: Served) -> None:
    bias = {str(server.tokenizer.encode("é")[0]): 100}
    (choice,) = completion(server, logprobs=1, logit_bias=bias, max_tokens=2)["choices"]
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3"] * 2
    (choice,) = completion(server, logprobs=0, logit_bias=bias, max_tokens=1, return_tokens_as_token_ids=True)[
        "choices"
    ]
    assert choice["logprobs"]["tokens"] == [f"token_id:{next(iter(bias))}"]
    (choice,) = completion(server, logprobs=0, logit_bias={str(VOCABULARY - 1): 100}, max_tokens=1)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{VOCABULARY - 1}"], "the tokenizer has no such token"


def test_only_the_prompt(server: Served) -> None:
    found = completion(server, prompt=["abc", "de"], max_tokens=0, echo=True, logprobs=1)
    assert [c["text"] for c in found["choices"]] == ["abc", "de"]
    assert [len(c["logprobs"]["tokens"]) for c in found["choices"]] == [3, 2]
    assert found["usage"]["completion_tokens"] == 0
    assert found["choices"][0]["finish_reason"] == "length"


def test_prompt_logprobs_are_vllms(server: Served) -> None:
    (choice,) = completion(server, prompt_logprobs=2)["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    b = str(server.tokenizer.encode("b")[0])
    assert second[b]["decoded_token"] == "b"
    assert sorted(v["rank"] for v in second.values() if v["rank"]) == [1, 2]
    assert len(second) in (2, 3)
    answer = chat(server, prompt_logprobs=0)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_the_prefix_cache_is_told(server: Served) -> None:
    for cached in (0, 32):
        found = completion(server, prompt="y" * 40)
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


# --- streams


@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1}, {"stop": "e"}])
def test_a_streamed_completion_is_the_whole_one(server: Served, more: dict[str, Any]) -> None:
    ask = {"prompt": ["ab", "xyz"], "n": 2, "seed": 3, "temperature": 1.0, "return_token_ids": True, **more}
    whole = completion(server, **ask)["choices"]
    events = chunks(server, "/v1/completions", answers.Completion, **ask)
    for wanted in whole:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == wanted["index"]]
        assert "".join(c["text"] for c in mine) == wanted["text"]
        assert [i for c in mine for i in c["token_ids"]] == wanted["token_ids"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [wanted["finish_reason"]]
        assert mine[-1]["stop_reason"] == wanted["stop_reason"]
        if "logprobs" in more:
            for name, value in wanted["logprobs"].items():
                found = [each for c in mine for each in c["logprobs"][name]]
                if name == "token_logprobs":
                    assert found == pytest.approx(value, abs=1e-4)
                elif name != "top_logprobs":
                    assert found == value
    assert len({e["id"] for e in events}) == 1
    assert all("usage" not in e for e in events)


def test_a_streamed_chat_is_the_whole_one(server: Served) -> None:
    whole = chat(server, n=2, seed=1, temperature=1.0, logprobs=True)["choices"]
    events = chunks(
        server, "/v1/chat/completions", answers.ChatChunk, messages=HI, n=2, seed=1, temperature=1.0, logprobs=True
    )
    for wanted in whole:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == wanted["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in c["delta"] for c in mine[1:])
        assert "".join(c["delta"].get("content", "") for c in mine) == wanted["message"]["content"]
        told = [each for c in mine if c["logprobs"] for each in c["logprobs"]["content"]]
        assert [t["token"] for t in told] == [t["token"] for t in wanted["logprobs"]["content"]]
        assert mine[-1]["finish_reason"] == wanted["finish_reason"]


def test_usage_in_streams(server: Served) -> None:
    ask = {"prompt": "ab", "stream_options": {"include_usage": True}}
    *events, last = chunks(server, "/v1/completions", answers.Completion, **ask)
    assert all(e["usage"] is None for e in events)
    assert last["choices"] == []
    assert last["usage"] == {
        **completion(server)["usage"],
        **{k: last["usage"][k] for k in last["usage"] if "det" in k},
    }
    ask["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = chunks(server, "/v1/completions", answers.Completion, **ask)
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 7
    *events, last = chunks(
        server, "/v1/chat/completions", answers.ChatChunk, messages=HI, stream_options=ask["stream_options"]
    )
    assert events[0]["usage"]["completion_tokens"] in (0, 1, 2)
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 7


# --- chats


def test_a_chat_is_the_template_continued(server: Served) -> None:
    found = chat(server)
    (choice,) = found["choices"]
    wanted = reference(server, "User: hi\nAssistant:", stop=("\nUser:", "\nSystem:"))
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert found["usage"]["prompt_tokens"] == len("User: hi\nAssistant:")


def test_a_chat_may_fill_the_window(server: Served) -> None:
    found = chat(server, max_tokens=None)
    assert found["usage"]["total_tokens"] == WINDOW
    assert found["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_of_chats(server: Served) -> None:
    (choice,) = chat(server, logprobs=True, top_logprobs=2)["choices"]
    told = choice["logprobs"]["content"]
    assert len(told) == 7
    for each in told:
        assert each["top_logprobs"][0]["logprob"] == each["logprob"], "greedy: it was the likeliest"
        assert bytes(each["bytes"]).decode("utf-8", "replace") is not None
        assert len(each["top_logprobs"]) == 2
    assert chat(server, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert chat(server)["choices"][0]["logprobs"] is None


# --- routing


def test_routing_is_told_for_each_token(server: Served) -> None:
    (choice,) = completion(server, return_routing=True, return_token_ids=True)["choices"]
    routing = choice["routing"]
    assert [each["token_id"] for each in routing] == choice["token_ids"]
    for each in routing:
        assert [layer["layer"] for layer in each["layers"]] == [1]
        for layer in each["layers"]:
            assert len(set(layer["experts"])) == 2
            assert layer["weights"] == sorted(layer["weights"], reverse=True)
    for path, model, more in (
        ("/v1/completions", answers.Completion, {"prompt": "ab"}),
        ("/v1/chat/completions", answers.ChatChunk, {"messages": HI}),
    ):
        events = chunks(server, path, model, return_routing=True, **more)
        streamed = [each for e in events for c in e["choices"] for each in c.get("routing", ())]
        assert len(streamed) == 7
        if path == "/v1/completions":
            assert [s["layers"][0]["experts"] for s in streamed] == [r["layers"][0]["experts"] for r in routing]
    assert "routing" not in completion(server)["choices"][0]


# --- the rest


def test_the_plain_door(server: Served) -> None:
    reply = server.post(
        "/generate", {"prompt": "ab", "max_length": 6, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 2}
    )
    found = valid(answers.Generated, reply.json)
    wanted = reference(server, "ab", max_tokens=6, temperature=0.5, top_p=0.9, top_k=7, seed=2, ignore_eos=False)
    assert found == {"generated_text": wanted.text}


def test_tokenize_and_back(server: Served) -> None:
    text = "héllo <|endoftext|>"
    found = valid(answers.Tokens, server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json)
    assert found["tokens"] == server.tokenizer.encode(text)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), WINDOW)
    assert found["token_strs"][0] == "h"
    back = valid(answers.Detokenized, server.post("/detokenize", {"tokens": found["tokens"]}).json)
    assert back == {"prompt": text}
    assert server.post("/detokenize", {"tokens": [server.tokenizer.eos_id]}).json == {"prompt": server.tokenizer.eos}
    assert server.post("/detokenize", {"tokens": [VOCABULARY - 1]}).error["param"] == "tokens"
    found = server.post("/tokenize", {"messages": HI}).json
    assert server.tokenizer.decode(found["tokens"]) == "User: hi\nAssistant:"
    assert found["token_strs"] is None
    found = server.post("/tokenize", {"messages": HI, "add_generation_prompt": False}).json
    assert server.tokenizer.decode(found["tokens"]) == "User: hi\n"
    end = server.tokenizer.eos
    assert server.post("/tokenize", {"prompt": end}).json["tokens"] == [server.tokenizer.eos_id], "and nothing else"
    assert server.post("/tokenize", {"prompt": end + " "}).json["tokens"] == server.tokenizer.encode(end + " ")
    assert server.post("/tokenize", {"messages": HI, "prompt": "x"}).error["param"] == "prompt"
    assert server.post("/tokenize", b"[").error["code"] == "invalid_json"


def test_what_a_remote_tokenizer_needs(server: Served) -> None:
    found = valid(answers.TokenizerInfo, server.get("/tokenizer_info").json)
    assert (found["eos_token"], found["bos_token"]) == (server.tokenizer.eos, None)
    assert (found["vocab_size"], found["model_max_length"]) == (server.tokenizer.vocab_size, WINDOW)
    assert "Assistant" in found["chat_template"]


def test_models(server: Served) -> None:
    found = valid(answers.Models, server.get("/v1/models").json)
    assert [m["id"] for m in found["data"]] == [NAME, "alias/two"]
    one = valid(answers.Model, server.get("/v1/models/alias/two").json)
    assert one["fathom"]["moe_layers"] == [1]
    assert one["max_model_len"] == WINDOW
    assert server.get("/v1/models/other").status == 404
    assert completion(server, model="alias/two")["model"] == "alias/two"


def test_health_ready_metrics(server: Served) -> None:
    assert server.get("/health").json == {"status": "ok"}
    assert server.get("/ready").json == {"status": "ready"}
    before = metrics(server)
    completion(server, prompt="mmm")
    after = metrics(server)

    def grew(name: str, **labels: str) -> float:
        key = (name, tuple(sorted({"model_name": NAME, **labels}.items())))
        return after[key] - before.get(key, 0)

    assert grew("vllm:generation_tokens_total") == 7
    assert grew("vllm:request_success_total", finished_reason="length") == 1
    assert grew("vllm:time_to_first_token_seconds_count") == 1
    assert grew("vllm:request_prompt_tokens_sum") == 3
    assert sum(grew("fathom:expert_tokens_total", layer="1", expert=str(e)) for e in range(6)) >= 2 * (3 + 6)
    assert after["vllm:num_requests_running", (("model_name", NAME),)] == 0
    assert after["fathom:expert_max_vio", (("layer", "1"), ("model_name", NAME))] >= 0
    http = ("fathom:http_requests_total", (("method", "POST"), ("path", "/v1/completions"), ("status", "200")))
    assert after[http] > before.get(http, 0)


def metrics(server: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(reply.body.decode()))
    assert all(family.type in ("counter", "gauge", "histogram") for family in families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_metrics_are_in_the_text_format_whatever_is_preferred(server: Served) -> None:
    reply = server.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"vllm:num_requests_running{" in reply.body


# --- mistakes


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param", "code"),
    [
        ("POST", "/v1/completions", {"prompt": "a", "promt": 1}, 400, "promt", "unknown_parameter"),
        ("POST", "/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "unsupported_parameter"),
        ("POST", "/v1/completions", b"{", 400, None, "invalid_json"),
        ("POST", "/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "model", "model_not_found"),
        ("POST", "/v1/completions", {"prompt": "a" * WINDOW}, 400, "prompt", "context_length_exceeded"),
        ("POST", "/v1/embeddings", {}, 404, None, "unknown_url"),
        ("GET", "/v1/completions", None, 405, None, "method_not_allowed"),
        ("POST", "/generate", {"prompt": 3}, 400, "prompt", "invalid_type"),
    ],
)
def test_mistakes_have_openais_shape(
    server: Served, method: str, path: str, body: Any, status: int, param: str | None, code: str
) -> None:
    reply = server.ask(method, path, body)
    valid(answers.ErrorBody, reply.json)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (status, param, code)
    assert reply.error["type"] == "invalid_request_error"
    assert reply.headers["x-request-id"]
    if status == 405:
        assert reply.headers["allow"] == "POST"


def test_bodies_are_json(server: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = server.post("/v1/completions", {"prompt": "a"}, content_type=kind)
        assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")
    assert (
        server.post(
            "/generate", {"prompt": "a", "max_length": 1}, content_type="application/json; charset=utf-8"
        ).status
        == 200
    )


def test_request_ids(server: Served) -> None:
    assert server.get("/health", x_request_id="my-id.7").headers["x-request-id"] == "my-id.7"
    assert completion(server)["id"].startswith("cmpl-")
    reply = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, x_request_id="abc")
    assert reply.json["id"] == "cmpl-abc"
    for wrong in ("a b", "x" * 129, 'a"b', "é"):
        assert server.get("/health", x_request_id=wrong).headers["x-request-id"] != wrong


# --- the document


def test_the_document_is_typed(server: Served) -> None:
    found = server.get("/openapi.json").json
    text = json.dumps(found)
    assert "422" not in {s for p in found["paths"].values() for o in p.values() for s in o["responses"]}
    assert "HTTPValidationError" not in text
    assert "x-token" not in text
    assert "x-prompt" not in text
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], path
            for status, response in operation["responses"].items():
                assert response.get("content"), (path, method, status)
                for content in response["content"].values():
                    assert content["schema"] != {}, (path, method, status)
    body = found["components"]["schemas"]["CompletionBody"]
    assert set(body["properties"]) == set(CompletionBody.model_fields)
    assert body["additionalProperties"] is False
    assert f'"maximum": {VOCABULARY - 1}' in text
    assert f'"maxItems": {WINDOW - 1}' in text
    everything = set(found["components"]["schemas"])
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= everything


@pytest.mark.parametrize("largest", [0, 1, 7, 9, 10, 11, 99, 100, 109, 262, 999, 1023, 1100])
def test_numbers_up_to_a_bound_as_a_pattern(largest: int) -> None:
    pattern = re.compile(up_to(largest))
    assert [n for n in range(3000) if pattern.match(str(n))] == list(range(largest + 1))
    assert not any(pattern.match(text) for text in ("", "-1", "01", "00", "1.0", "x"))


def test_no_page_loads_from_elsewhere(server: Served) -> None:
    for path in ("/docs", "/redoc"):
        assert server.get(path).status == 404
