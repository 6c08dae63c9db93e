"""The page in a real browser: the command in a process of its own, and an API that can be told to fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="needs the extra `client`")
from chromium import Notes, browser, opened, why_not
from fake_api import EXPERTS, LAYERS, TEXT, FakeApi, served, until

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)
from playwright.sync_api import Browser, Page, expect

expect.set_options(timeout=30_000)
DOOR = Path(__file__).parents[2] / "client_app.py"
WHOLE = "".join(TEXT)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeApi]:
    with served(FakeApi(pause=0.02)) as fake:
        yield fake


@pytest.fixture(scope="module")
def client(fake: FakeApi) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(DOOR), "--port", "0"]
    environment = os.environ | {"FATHOM_API_URL": fake.url, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url(client: subprocess.Popen[str]) -> str:
    """Where the command says that the page is."""
    assert client.stderr is not None
    for line in client.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found[0]
    pytest.fail("the page did not say where it is")


@pytest.fixture(scope="module")
def launched() -> Iterator[Browser]:
    with browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def first(launched: Browser, url: str) -> tuple[Page, Notes]:
    page, notes = opened(launched, url)
    page.set_default_timeout(20_000)
    return page, notes


@pytest.fixture
def page(first: tuple[Page, Notes], fake: FakeApi) -> Page:
    fake.mode, fake.pause = "ok", 0.02
    fake.said.clear()
    fake.ended.clear()
    return first[0]


def test_a_reader_types_a_prompt_and_reads_the_answer_as_it_comes(page: Page, first: tuple[Page, Notes]) -> None:
    expect(page.locator("h1")).to_have_text("demo@520")
    page.get_by_label("number input for Max length").fill("60")
    page.get_by_label("Prompt").fill("The state of\nthe <Union>")
    page.get_by_role("button", name="Continue the text").click()
    answer = page.locator(".fx-answer")
    expect(answer).to_contain_text("the people of")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()  # more is still to come
    early = answer.inner_text()
    expect(page.get_by_role("button", name="Continue the text")).to_be_visible()
    assert answer.inner_text() == "The state of\nthe <Union>" + WHOLE * 5
    assert len(early) < len(WHOLE) * 4
    expect(page.locator(".fx-facts")).to_contain_text("60 tokens")
    assert first[1].elsewhere == []
    assert first[1].complaints == []


def test_the_routing_view_shows_the_experts_of_every_token(page: Page, fake: FakeApi) -> None:
    fake.pause = 0
    page.get_by_label("number input for Max length").fill("60")
    page.get_by_role("button", name="Continue the text").click()
    view = page.locator("#fathom-routing")
    expect(view.locator("figcaption")).to_contain_text("60 tokens through 3 MoE layers, 3 of 11 experts each.")
    expect(page.get_by_role("button", name="Continue the text")).to_be_visible()
    view.scroll_into_view_if_needed()
    expect(view.locator(".fx-t")).to_have_count(60)
    expect(view.locator(".fx-t.fx-draft")).to_have_count(20)
    expect(view.locator(".fx-bed")).to_have_count(len(LAYERS))
    drawn = page.locator(".fx-map")
    place = drawn.bounding_box()
    assert place is not None
    # token 31 (i = 30) of layer 1 chose expert (3 * 30) % 11 first
    x, y = place["x"] + 30 * 15 + 7, place["y"] + 26 + 10 * (90 % EXPERTS) + 5
    page.mouse.move(x, y)
    tip = view.locator(".fx-tip")
    expect(tip).to_be_visible()
    expect(tip).to_contain_text("token 31, id 130")
    expect(tip.locator("mark")).to_have_text(f"{90 % EXPERTS} (1.50)")
    expect(tip.locator("tr")).to_have_count(len(LAYERS))
    expect(view.locator(".fx-t.fx-on")).to_have_attribute("data-i", "30")
    view.locator(".fx-maps").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("token 2, id 101, proposed by MTP")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    view.locator(".fx-t").nth(3).hover()
    expect(tip.locator("b")).to_have_text("·<script>alert(1)</script>")


def test_stop_ends_the_stream_at_the_server(page: Page, fake: FakeApi) -> None:
    fake.pause = 30  # a model that thinks: one token, then nothing
    page.get_by_role("button", name="Continue the text").click()
    expect(page.locator(".fx-answer")).to_contain_text(" the")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".fx-facts")).to_contain_text("stopped by you")
    assert until(lambda: fake.ended == ["left"])


def test_a_chat_shows_texts_as_they_are(page: Page, fake: FakeApi) -> None:
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("number input for Max length").fill("12")
    for said in ("Who <b>are</b> you? **x**", "And {{why}}?"):
        page.get_by_label("Your turn").fill(said)
        page.get_by_label("Your turn").press("Enter")
        expect(page.locator(".fx-turn.fx-you p").last).to_have_text(said)
        expect(page.locator(".fx-turn.fx-model p").last).to_contain_text("한국")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.locator(".fx-turn.fx-model p").last.inner_text() == WHOLE.strip()
    assert [m["role"] for m in fake.said[1]["messages"]] == ["user", "assistant", "user"]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".fx-turn")).to_have_count(0)
    page.get_by_role("tab", name="Completion").click()


def test_a_server_that_is_busy_gone_and_back(page: Page, fake: FakeApi) -> None:
    fake.mode = "busy"
    page.get_by_role("button", name="Continue the text").click()
    expect(page.get_by_role("alert")).to_contain_text("It asks to wait 7 seconds.")
    fake.stop()
    expect(page.locator(".fx-header + .fx-notice")).to_contain_text("fathom serve RUN")
    expect(page.locator(".fx-pill")).to_have_text("not there")
    fake.mode = "ok"
    fake.start()
    expect(page.locator(".fx-pill")).to_have_text("ready")  # nobody pressed anything
    expect(page.locator(".fx-header + .fx-notice")).to_have_count(0)


def test_a_page_that_is_closed_frees_the_model(page: Page, launched: Browser, url: str, fake: FakeApi) -> None:
    other, _ = opened(launched, url, viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert other.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    other.get_by_label("Prompt").fill("x")
    other.get_by_label("number input for Max length").fill("255")
    fake.pause = 0.2
    other.get_by_role("button", name="Continue the text").click()
    expect(other.locator(".fx-answer")).to_contain_text("the people")
    expect(other.locator(".fx-maps")).to_be_visible()
    assert other.evaluate("document.documentElement.scrollWidth") <= 390  # a telephone scrolls one way only
    other.close()
    assert until(lambda: fake.ended == ["left"], 30)


def test_sigterm_ends_it_in_peace(page: Page, client: subprocess.Popen[str], url: str) -> None:
    with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
        assert json.load(response) == {"status": "ok"}
    client.send_signal(signal.SIGTERM)  # while a page is open
    assert client.wait(20) == 0
