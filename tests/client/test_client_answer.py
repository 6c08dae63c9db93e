"""An answer as it grows, how it is stopped, what is said of it; whether the API is there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from itertools import pairwise

import pytest

pytest.importorskip("httpx_sse", reason="needs the extra `client`")
from fake_api import MODEL, FakeApi, served

from fathom.client.answer import Answer, Reading
from fathom.client.http import Api, ApiConfig, Away, Broken, Busy, Failed, KeyRefused, Refused
from fathom.client.pieces import card, continuation, conversation, header, obstacle, problem, progress
from fathom.client.status import Status, Watch, look
from fathom.client.wire import Model, Piece, Usage

model = Model.model_validate(MODEL)


class Source:
    """Pieces; whether the iterator was closed."""

    def __init__(self, *texts: str, pause: float = 0.0, error: Exception | None = None) -> None:
        self.texts, self.pause, self.error, self.closed = texts, pause, error, False

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        try:
            for text in self.texts:
                yield Piece(text=text)
                await asyncio.sleep(self.pause)
            if self.error is not None:
                raise self.error
            yield Piece(finish_reason="stop", usage=Usage(completion_tokens=len(self.texts)))
        finally:
            self.closed = True


def read(source: Source, stop_after: int | None = None, blink: float = 0.01) -> tuple[Answer, list[str]]:
    """The answer, and what was seen of it on the way."""

    async def run() -> tuple[Answer, list[str]]:
        reading, seen = Reading(source.pieces(), blink), []
        async for answer in reading:
            seen.append(answer.text)
            if stop_after is not None and len(seen) == stop_after:
                reading.stop()
        return reading.answer, seen

    return asyncio.run(run())


def test_an_answer_grows_and_ends() -> None:
    source = Source("a", "b", "c", pause=0.03)
    answer, seen = read(source)
    assert answer.text == seen[-1] == "abc"
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    assert len(seen) >= 3
    assert (answer.tokens, answer.finish_reason, answer.error, source.closed) == (3, "stop", None, True)
    assert answer.speed is not None


def test_what_comes_within_a_blink_is_told_together() -> None:
    answer, seen = read(Source(*"x" * 500), blink=0.05)
    assert answer.text == "x" * 500
    assert len(seen) < 50


def test_stopping_ends_a_stream_that_says_nothing_more() -> None:
    source = Source("a", "b", pause=60)
    started = time.monotonic()
    answer, _ = read(source, stop_after=1)
    assert time.monotonic() - started < 30
    assert (answer.text, answer.stopped, source.closed) == ("a", True, True)


def test_stopping_before_it_began() -> None:
    async def run() -> Answer:
        reading = Reading(Source("a").pieces())
        reading.stop()
        async for _ in reading:
            pass
        return reading.answer

    assert asyncio.run(run()).text == ""


def test_leaving_the_loop_closes_the_stream() -> None:
    source = Source("a", "b", pause=60)

    async def run() -> None:
        steps = aiter(Reading(source.pieces()))
        await anext(steps)
        await steps.aclose()

    asyncio.run(run())
    assert source.closed


def test_an_error_keeps_what_came_and_a_bug_is_no_error() -> None:
    answer, _ = read(Source("a", error=Broken("it broke")))
    assert (answer.text, str(answer.error)) == ("a", "it broke")
    with pytest.raises(ZeroDivisionError):
        read(Source("a", error=ZeroDivisionError()))


# --- what is said


def test_facts_of_an_answer() -> None:
    answer = Answer()
    assert "waiting for the first token" in progress(answer, 7, True)
    answer.add(Piece(text="a"))
    assert progress(answer, 7, True) == '<p class="fx-facts">1 token · seed 7</p>'
    details = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
    usage = {"prompt_tokens": 9, "completion_tokens": 8, "completion_tokens_details": details}
    usage["prompt_tokens_details"] = {"cached_tokens": 4}
    answer.add(Piece(finish_reason="length", usage=Usage.model_validate(usage)))
    told = progress(answer, None, False)
    for fact in (
        "8 tokens",
        "max length reached",
        "3 of 4 MTP drafts accepted",
        "4 of 9 prompt tokens cached",
        "greedy",
    ):
        assert fact in told
    answer.stopped = True
    assert "stopped by you" in progress(answer, None, False)


@pytest.mark.parametrize(
    ("error", "way"),
    [
        (Away("There is no API at X."), "fathom serve"),
        (KeyRefused("The API refuses the key."), "FATHOM_API_KEY"),
        (Busy("The API is busy.", 503, 7), "send it again"),
        (Broken("It broke."), "What came before stays"),
        (Refused("The window holds <256>."), ""),
        (Failed("It failed."), ""),
    ],
)
def test_every_problem_has_its_words_and_its_way_out(error: Failed, way: str) -> None:
    told = problem(error)
    assert 'role="alert"' in told
    assert way in told
    assert str(error) in told or "&lt;256&gt;" in told


def test_texts_are_escaped_everywhere() -> None:
    wicked = "<script>alert(1)</script>{{value}}"
    named = Model(id=wicked)
    for told in (
        continuation(wicked, wicked, True),
        conversation([{"role": "user", "content": wicked}, {"role": "assistant", "content": wicked}], True),
        header(Status("ready", "", named), "http://x"),
        header(Status("failed", wicked), wicked),
        obstacle(Status("waiting", wicked), wicked),
        card(Model.model_validate(MODEL | {"fathom": MODEL["fathom"] | {"dtype": wicked, "device": wicked}})),
        problem(Refused(wicked)),
    ):
        assert "<script" not in told
        assert "{{" not in told
        assert "&lt;script&gt;" in told


def test_the_card_tells_what_it_knows() -> None:
    told = card(model)
    for figure in (
        "1.93M",
        "1.03M active",
        "3 of 11",
        "in 3 of 5 layers",
        "1,920 B",
        "256",
        "1 depth",
        "3.2153",
        "520",
    ):
        assert figure in told
    bare = card(Model(id="gpt-2", max_model_len=1024))
    assert "1,024" in bare
    assert bare.count("<dt>") == 1
    dense = card(
        Model.model_validate(MODEL | {"fathom": MODEL["fathom"] | {"moe_layers": [], "cache_bytes_per_token": 70_272}})
    )
    assert "none: dense" in dense
    assert "68.6 KiB" in dense


# --- whether the API is there


def seen(fake: FakeApi, key: str | None = None) -> Status:
    async def run() -> Status:
        async with Api(ApiConfig(url=fake.url, key=key)) as api:
            return await look(api)

    return asyncio.run(run())


def test_looks() -> None:
    fake = FakeApi()
    with served(fake):
        assert seen(fake) == Status("ready", "", model)
        fake.mode = "loading"
        assert seen(fake) == Status("waiting", "the weights are being read", model)
        fake.mode = "none"
        assert seen(fake).state == "waiting"
        fake.mode = "html"
        assert seen(fake).state == "away"
        fake.mode, fake.key = "ok", "right"
        assert seen(fake, "wrong").state == "key"
        assert seen(fake, "right").state == "ready"
    assert seen(fake).state == "away"
    for state in ("waiting", "away", "key", "failed"):
        assert 'role="alert"' in header(Status(state, "why"), fake.url)
    for state in ("ready", "unknown"):
        assert 'role="alert"' not in header(Status(state), fake.url)


def test_a_hundred_pages_look_once() -> None:
    async def run() -> None:
        async with Api(ApiConfig(url=fake.url)) as api:
            watch = Watch(api, fresh=60)
            found = await asyncio.gather(*(watch.status() for _ in range(100)))
            assert {status.state for status in found} == {"ready"}
            assert fake.asked == ["/v1/models"]
            await watch.status(now=True)
            assert fake.asked == ["/v1/models"] * 2

    with served(FakeApi()) as fake:
        asyncio.run(run())
