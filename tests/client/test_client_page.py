"""The page without a browser: its server, its command, and what pressing does."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="needs the extra `client`")
import gradio as gr
import httpx
from fake_api import TEXT, FakeApi, served, until
from fastapi import FastAPI

from fathom.cli.main import main
from fathom.client.app import PageConfig, application, listen
from fathom.client.http import Api, ApiConfig
from fathom.client.page import Page
from fathom.client.status import Status
from fathom.errors import ConfigError, RequestError

SESSION: Any = SimpleNamespace(session_hash="abc")
LOOP = asyncio.new_event_loop()  # one for all: the page keeps connections


@pytest.fixture(scope="module")
def page() -> Page:
    """The components are made once; each test gives it an API."""
    return Page(Api())


@pytest.fixture
def fake(page: Page) -> Iterator[FakeApi]:
    with served(FakeApi()) as fake:
        page.api = page.watch.api = Api(ApiConfig(url=fake.url))
        yield fake


def values(page: Page, **changed: Any) -> dict[Any, Any]:
    """What the components hold."""
    c = page.controls
    held: dict[Any, Any] = {
        page.prompt: "The state", page.said: "Who?", page.history: [], c.max_length: 12, c.temperature: 0.7,
        c.top_p: 0.9, c.top_k: 50, c.greedy: False, c.seed: "", c.experts: True,
    }  # fmt: skip
    for name, value in changed.items():
        held[getattr(page, name, None) or getattr(c, name)] = value
    return held


def press(page: Page, what: str, stop_at: int | None = None, **changed: Any) -> list[tuple[Any, ...]]:
    """Everything that an event tells; stop_at: press Stop after so many."""

    async def run() -> list[tuple[Any, ...]]:
        told = []
        async for update in getattr(page, what)(values(page, **changed), SESSION):
            told.append(update)
            if len(told) == stop_at:
                page.stop_completion(SESSION)
                page.stop_chat(SESSION)
        return told

    return LOOP.run_until_complete(run())


def text(shown: str) -> str:
    return re.sub(r"<[^>]*>", "", shown)


def test_a_completion(page: Page, fake: FakeApi) -> None:
    told = press(page, "complete", seed="5")
    answer, facts, routing, send, stop = told[-1]
    assert "&lt;script&gt;" in answer
    assert text(answer).startswith("The state the people of")
    assert "12 tokens" in facts
    assert "seed 5" in facts
    assert 'class="fx-routing"' in routing
    assert (send["visible"], stop["visible"]) == (True, False)
    assert (told[0][3]["visible"], told[0][4]["visible"]) == (False, True)
    assert fake.said[0]["seed"] == 5
    assert page.readings == {}


def test_controls_become_a_request(page: Page, fake: FakeApi) -> None:
    press(page, "complete", greedy=True, seed="9", experts=False, max_length=3)
    press(page, "complete", temperature=1.5, top_p=0.3, top_k=0, max_length=4)
    press(page, "complete", max_length=4)
    greedy, hot, drawn = fake.said
    assert (greedy["temperature"], greedy["top_p"], greedy["max_tokens"]) == (0, 1, 3)
    assert not {"top_k", "seed", "return_routing"} & set(greedy)
    assert (hot["temperature"], hot["top_p"], hot["max_tokens"]) == (1.5, 0.3, 4)
    assert "top_k" not in hot
    assert hot["seed"] != drawn["seed"]  # drawn anew, and told


def test_a_seed_that_is_none_is_refused_in_words(page: Page, fake: FakeApi) -> None:
    ((_, facts, *_, stop),) = press(page, "complete", seed="one")
    assert "whole number" in facts
    assert stop["visible"] is False
    assert fake.said == []
    with pytest.raises(RequestError, match="64 bits"):
        page.controls.sampling(values(page, seed=str(2**63)))


def test_a_chat_keeps_its_turns(page: Page, fake: FakeApi) -> None:
    box, history, shown, *_ = press(page, "say")[-1]
    assert box == ""
    assert [turn["role"] for turn in history] == ["user", "assistant"]
    assert history[1]["content"] == "".join(TEXT).strip()
    assert "&lt;script&gt;" in shown
    press(page, "say", history=history, said="And who else?")
    assert [m["content"] for m in fake.said[1]["messages"]] == ["Who?", history[1]["content"], "And who else?"]


def test_a_turn_that_failed_leaves_the_conversation_as_it_was(page: Page, fake: FakeApi) -> None:
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    fake.mode = "busy"
    box, history, _, facts, *_ = press(page, "say", history=before)[-1]
    assert (box, history) == ("Who?", before)
    assert "7 seconds" in facts
    fake.mode = "cut"  # something came: it is kept
    box, history, _, facts, *_ = press(page, "say", history=before)[-1]
    assert (box, len(history)) == ("", 4)
    assert "What came before stays" in facts
    assert len(press(page, "say", said="  ")) == 1
    assert len(fake.said) == 2


def test_a_chat_that_fills_the_window_leaves_its_oldest_turns_out(page: Page, fake: FakeApi) -> None:
    fake.mode = "full"
    before = [{"role": role, "content": role[0] + str(i)} for i in range(4) for role in ("user", "assistant")]
    _, history, _, facts, *_ = press(page, "say", history=before)[-1]
    assert [len(body["messages"]) for body in fake.said] == [9, 7, 5, 3]
    assert [m["content"] for m in fake.said[-1]["messages"]] == ["u3", "a3", "Who?"]
    assert "6 older turns left out" in facts
    assert history[:8] == before  # the reader still sees them


def test_emptied_fields_mean_their_defaults(page: Page, fake: FakeApi) -> None:
    press(page, "complete", max_length=None, temperature=None, top_p=None, top_k=None)
    (asked,) = fake.said
    assert (asked["max_tokens"], asked["temperature"], asked["top_p"], asked["top_k"]) == (128, 0.7, 0.9, 50)


@pytest.mark.parametrize("what", ["complete", "say"])
def test_stop_closes_the_connection(page: Page, fake: FakeApi, what: str) -> None:
    fake.pause = 0.02
    told = press(page, what, stop_at=3, max_length=10_000)
    assert until(lambda: fake.ended == ["left"])
    assert any("stopped by you" in str(part) for part in told[-1])
    assert page.readings == {}


def test_the_header_follows_the_api(page: Page, fake: FakeApi) -> None:
    page.watch.fresh = -1.0

    def look(seen: Status | None) -> tuple[Any, ...]:
        return LOOP.run_until_complete(page.look(seen))

    seen, header, card, length, experts = look(None)
    assert seen.state == "ready"
    assert "demo@520" in header
    assert "1.93M" in card
    assert (length["maximum"], experts["visible"]) == (255, True)
    assert look(seen)[0] == gr.skip()
    fake.stop()
    gone, header, card, *_ = look(seen)
    assert gone.state == "away"
    assert "fathom serve" in header
    assert "1.93M" in card  # what was known stays
    ((_, facts, *_),) = press(page, "complete")
    assert "fathom serve" in facts
    fake.start()
    back, header, *_ = look(gone)
    assert back.state == "ready"
    assert "alert" not in header


# --- the server


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return application(Api())


def get(app: FastAPI, path: str, method: str = "GET") -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://page") as client:
            return await client.request(method, path)

    return LOOP.run_until_complete(run())


def test_health_needs_no_api(app: FastAPI) -> None:
    response = get(app, "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_the_browser_is_kept_at_home(app: FastAPI) -> None:
    for path in ("/", "/health", "/nothing"):
        policy = get(app, path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert not re.search(r"https?:|\*", policy)
    assert get(app, "/gradio_api/upload", "POST").status_code == 404
    assert get(app, "/docs").status_code == 404  # it would load scripts from elsewhere
    assert get(app, "/favicon.ico").headers["content-type"] == "image/svg+xml"


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another --port"):
            listen(PageConfig(port=taken.getsockname()[1]))
    with pytest.raises(ConfigError):
        listen(PageConfig(host="192.0.2.1", port=0))
    listen(PageConfig(port=0)).close()


# --- the command


@pytest.mark.parametrize("missing", ["gradio", "httpx_sse"])
def test_a_missing_extra_is_told_with_its_command(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("fathom.client")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["client", "--port", "0"]) == 2
    assert f'needs {missing}, which is not installed: pip install "fathom-lm[client]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api", "ftp://x"], "no address of an API"),
        (["--api-key", "schlüssel"], "ASCII"),
        (["--host", "300.1.1.1"], "--host"),
    ],
)
def test_mistakes_are_told(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "--port", "0", *arguments]) == 2
    assert words in capsys.readouterr().err
