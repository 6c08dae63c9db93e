"""The client against an API that speaks the documented wire, and fails in every documented way."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import formatdate
from typing import Any, TypeVar

import pytest

pytest.importorskip("httpx_sse", reason="needs the extra `client`")
import httpx
from fake_api import CHOSEN, LAYERS, TEXT, FakeApi, served, until
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.client.http import (
    Api,
    ApiConfig,
    ApiError,
    Away,
    Broken,
    Busy,
    Failed,
    KeyRefused,
    Refused,
    Sampling,
    address,
    nearby,
    refusal,
    retry_after,
)
from fathom.client.wire import Model, Piece
from fathom.errors import ConfigError, UserError

T = TypeVar("T")
SHORT = Sampling(max_length=12, seed=1)


def ask(url: str, what: Callable[[Api], Awaitable[T]], **config: Any) -> T:
    """Do something with the API at an address."""

    async def run() -> T:
        async with Api(ApiConfig(url=url, **config)) as api:
            return await what(api)

    return asyncio.run(run())


async def complete(api: Api, sampling: Sampling = SHORT, routing: bool = True) -> list[Piece]:
    model = (await api.models())[0]
    return [piece async for piece in api.complete("The state", sampling, model, routing)]


async def chat(api: Api) -> list[Piece]:
    model = (await api.models())[0]
    return [piece async for piece in api.chat([{"role": "user", "content": "Who?"}], SHORT, model, True)]


@pytest.mark.parametrize("door", [complete, chat])
def test_an_answer_comes_whole_with_routing_and_usage(door: Callable[[Api], Awaitable[list[Piece]]]) -> None:
    with served(FakeApi()) as fake:
        pieces = ask(fake.url, door)
    assert "".join(piece.text for piece in pieces) == "".join(TEXT)
    routing = [token for piece in pieces for token in piece.routing]
    assert [token.token for token in routing] == list(TEXT)
    assert [layer.layer for layer in routing[0].layers] == list(LAYERS)
    assert all(len(layer.experts) == len(layer.weights) == CHOSEN for token in routing for layer in token.layers)
    assert [token.draft for token in routing] == [i % 3 == 1 for i in range(len(TEXT))]
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
    usage = pieces[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (9, 12)
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.accepted_prediction_tokens == 4


def test_what_is_asked_is_what_the_controls_say() -> None:
    sampling = Sampling(max_length=2, temperature=0.3, top_p=0.5, top_k=7, seed=11)
    with served(FakeApi()) as fake:
        ask(fake.url, lambda api: complete(api, sampling))
        ask(fake.url, lambda api: complete(api, Sampling(max_length=2, top_k=0), routing=False))
        fake.model["fathom"] = None  # another server
        ask(fake.url, lambda api: complete(api, sampling))
    first, plain, other = fake.said
    assert first == {
        "model": "demo@520", "prompt": "The state", "max_tokens": 2, "temperature": 0.3, "top_p": 0.5, "top_k": 7,
        "seed": 11, "stream": True, "stream_options": {"include_usage": True}, "return_routing": True,
    }  # fmt: skip
    assert not {"top_k", "seed", "return_routing"} & set(plain)
    assert "return_routing" not in other


def test_the_model_card_is_read_and_other_servers_may_say_less() -> None:
    with served(FakeApi()) as fake:
        (model,) = ask(fake.url, lambda api: api.models())
        assert (model.id, model.max_model_len, model.routes) == ("demo@520", 256, True)
        assert model.fathom is not None
        assert model.fathom.moe_layers == LAYERS
        fake.model = {"id": "gpt-2", "object": "model", "surprise": [1, 2]}
        (model,) = ask(fake.url, lambda api: api.models())
    assert (model.id, model.max_model_len, model.fathom, model.routes) == ("gpt-2", None, None, False)


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("busy", Busy, "7 seconds"),
        ("limited", Busy, "1 second."),
        ("refused", Refused, "window holds 256"),
        ("failed", Failed, "engine failed"),
        ("error", Broken, "engine failed"),
        ("cut", Broken, "without saying that it was complete"),
        ("broken", Broken, "broke"),
        ("html", Away, "not this API"),
    ],
)
def test_every_failure_has_words(mode: str, kind: type[ApiError], words: str) -> None:
    with served(FakeApi(mode)) as fake, pytest.raises(kind, match=words) as caught:
        ask(fake.url, complete)
    assert isinstance(caught.value, UserError)
    if kind is Busy:
        assert caught.value.retry_after == (7 if mode == "busy" else 1)


def test_what_came_before_a_break_is_kept() -> None:
    async def run(api: Api) -> list[str]:
        model, texts = (await api.models())[0], list[str]()
        try:
            async for piece in api.complete("x", SHORT, model):
                texts.append(piece.text)
        except Broken:
            return texts
        pytest.fail("it did not break")

    with served(FakeApi("cut")) as fake:
        assert ask(fake.url, run) == list(TEXT[:3])


def test_the_key_is_sent_and_a_wrong_one_is_told() -> None:
    with served(FakeApi(key="right")) as fake:
        assert len(ask(fake.url, lambda api: api.models(), key="right")) == 1
        for key in ("wrong", None):
            with pytest.raises(KeyRefused, match="API key is wrong"):
                ask(fake.url, lambda api: api.models(), key=key)
    with pytest.raises(ConfigError, match="ASCII"):
        Api(ApiConfig(key="schlüssel"))


def test_nobody_there() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        for what in (lambda api: api.models(), lambda api: api.waiting()):
            with pytest.raises(Away, match=f"{url}.*nothing listens there"):
                ask(url, what)
        with pytest.raises(Away, match=url):
            ask(url, lambda api: _drain(api.complete("x", SHORT, Model(id="m"))))
    with served(FakeApi()) as fake, pytest.raises(Away, match="TLS failed"):
        ask(fake.url.replace("http:", "https:"), lambda api: api.models())


async def _drain(pieces: AsyncIterator[Piece]) -> None:
    async for _ in pieces:
        pass


def test_a_server_that_says_nothing_is_given_up() -> None:
    with served(FakeApi("silent")) as fake:
        with pytest.raises(Broken, match=r"for 0\.2 seconds"):
            ask(fake.url, complete, patience=0.2)
        assert until(lambda: fake.ended == ["left"])


def test_leaving_closes_the_connection() -> None:
    async def run(api: Api) -> None:
        model = (await api.models())[0]
        pieces = api.complete("x", Sampling(max_length=10_000), model)
        async for _ in pieces:
            break
        await pieces.aclose()
        assert await asyncio.to_thread(until, lambda: fake.ended)

    with served(FakeApi(pause=0.01)) as fake:
        ask(fake.url, run)
        assert fake.ended == ["left"]


def test_whether_it_is_ready() -> None:
    with served(FakeApi("loading")) as fake:
        assert ask(fake.url, lambda api: api.waiting()) == "the weights are being read"
        fake.mode = "ok"
        assert ask(fake.url, lambda api: api.waiting()) is None


class Pieces(httpx.AsyncByteStream):
    """A body that comes in given pieces."""

    def __init__(self, parts: list[bytes]) -> None:
        self.parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part


CUT: list[bytes] = []


def _cut(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Pieces(CUT))


@pytest.fixture(scope="module")
def cutting() -> Api:
    """An API whose streams come as CUT has them."""
    api = Api()
    api._http = httpx.AsyncClient(transport=httpx.MockTransport(_cut), base_url=api.url)
    return api


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n", "\r"]))
def test_streams_are_read_however_they_are_cut(cutting: Api, texts: list[str], cuts: list[int], end: str) -> None:
    """In the middle of a character, of a line, of a line break; and a text may have any separator of Unicode's."""
    lines = [": a comment", ""]
    for text in texts:
        lines += ["data: " + json.dumps({"choices": [{"text": text}]}, ensure_ascii=False), ""]
    whole = "".join(line + end for line in [*lines, "data: [DONE]", ""]).encode()
    CUT.clear()
    while whole:
        size = cuts[len(CUT) % len(cuts)]
        CUT.append(whole[:size])
        whole = whole[size:]

    async def run() -> list[str]:
        return [piece.text async for piece in cutting.complete("x", SHORT, Model(id="m"))]

    assert asyncio.run(run()) == texts


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("127.0.0.1:5000/v1/", "http://127.0.0.1:5000"),
        ("https://example.org/models/v1", "https://example.org/models"),
        ("model-service:5000", "http://model-service:5000"),
    ],
)
def test_addresses(given_: str, meant: str) -> None:
    assert address(given_) == meant


def test_a_password_in_an_address_is_used_and_not_shown() -> None:
    api = Api(ApiConfig(url="https://me:secret@example.org/v1"))
    assert api.url == "https://example.org"
    assert api._http.base_url.userinfo == b"me:secret"


@pytest.mark.parametrize("wrong", ["", "ftp://host", "http://", "http://host:port", "http://host/?a=b"])
def test_what_is_no_address_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        address(wrong)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("12") == 12
    assert 8 <= (retry_after(formatdate(time.time() + 10, usegmt=True)) or 0) <= 11
    assert retry_after(formatdate(time.time() - 10, usegmt=True)) == 0
    assert retry_after(None) is retry_after("soon") is retry_after("") is None


def test_refusals_of_other_servers() -> None:
    assert "bad thing" in str(refusal(422, b'{"detail": "bad thing"}', {}, "u"))
    assert isinstance(refusal(404, b"<html>", {}, "u"), Away)
    assert isinstance(refusal(404, b'{"error": {"message": "no such model"}}', {}, "u"), Refused)
    assert isinstance(refusal(308, b"", {}, "u"), Away)
    assert "HTTP 502" in str(refusal(502, b"\xff", {}, "u"))


@pytest.mark.parametrize(
    ("host", "near"),
    [("127.0.0.1", True), ("::1", True), ("10.1.2.3", True), ("localhost", True), ("model-service", True),
     ("8.8.8.8", False), ("api.example.org", False)],
)  # fmt: skip
def test_no_proxy_stands_between_neighbours(host: str, near: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearby(host) is near
    if host == "localhost":
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        with served(FakeApi()) as fake:
            assert ask(fake.url, lambda api: api.models())
