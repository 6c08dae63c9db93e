"""OpenAI's Python client: models, completions, chats, streams, errors, retries."""

from __future__ import annotations

import asyncio

import openai
from common import KEY, KEYED, MODEL, OPEN, Checks

check = Checks()
client = openai.OpenAI(base_url=f"{OPEN}/v1", api_key="none", max_retries=0)
HI = [{"role": "user", "content": "Who are the people?"}]

models = client.models.list().data
check("models.list", [m.id for m in models] == [MODEL], [m.id for m in models])
check("models.retrieve", client.models.retrieve(MODEL).id == MODEL)

greedy = {"model": MODEL, "max_tokens": 12, "temperature": 0}
one = client.completions.create(prompt="The state of", **greedy)
check("completions", one.choices[0].text and one.usage.completion_tokens <= 12, repr(one.choices[0].text))
check("request ids", bool(one._request_id) and one.id.endswith(one._request_id))
many = client.completions.create(prompt=["The state of", "We the"], n=2, seed=7, **{**greedy, "temperature": 1})
check("batches with n", [c.index for c in many.choices] == [0, 1, 2, 3])
again = client.completions.create(prompt=["The state of", "We the"], n=2, seed=7, **{**greedy, "temperature": 1})
check("seeds", [c.text for c in many.choices] == [c.text for c in again.choices])
told = client.completions.create(prompt="The state of", logprobs=3, echo=True, **greedy).choices[0].logprobs
check(
    "echo and logprobs", told.token_logprobs[0] is None and len(told.tokens) == len(told.text_offset), told.tokens[:4]
)
stream = client.completions.create(prompt="The state of", stream=True, stream_options={"include_usage": True}, **greedy)
events = list(stream)
text = "".join(e.choices[0].text for e in events if e.choices)
check("a stream is the whole", text == one.choices[0].text)
check("its usage", events[-1].usage.total_tokens == one.usage.total_tokens)

chat = client.chat.completions.create(
    model=MODEL, messages=HI, max_completion_tokens=12, logprobs=True, top_logprobs=2, temperature=0,
    user="me", store=False, metadata={"a": "b"},
)  # fmt: skip
check("chat", chat.choices[0].message.role == "assistant", repr(chat.choices[0].message.content))
check("chat logprobs", len(chat.choices[0].logprobs.content[0].top_logprobs) == 2)
with client.chat.completions.stream(model=MODEL, messages=HI, max_completion_tokens=12, temperature=0) as manager:
    manager.until_done()
    final = manager.current_completion_snapshot
check("chat.completions.stream", final.choices[0].message.content == chat.choices[0].message.content)
conversation = [*HI, chat.choices[0].message.model_dump(), {"role": "user", "content": "And then?"}]
check(
    "an answer can be sent back",
    client.chat.completions.create(model=MODEL, messages=conversation, max_tokens=4).choices,
)
routed = client.completions.create(
    prompt="We", extra_body={"return_routing": True, "top_k": 5, "min_p": 0.01}, **greedy
)
check("extensions by extra_body", len(routed.choices[0].routing) == routed.usage.completion_tokens)

for what, kind, arguments in (
    ("an unknown model", openai.NotFoundError, {"model": "gpt", "prompt": "a"}),
    ("an impossible option", openai.BadRequestError, {"model": MODEL, "prompt": "a", "temperature": -1}),
    ("an unknown option", openai.BadRequestError, {"model": MODEL, "prompt": "a", "extra_body": {"tempratur": 1}}),
    ("a suffix", openai.BadRequestError, {"model": MODEL, "prompt": "a", "suffix": "b"}),
    ("a prompt beyond the window", openai.BadRequestError, {"model": MODEL, "prompt": [5] * 5000}),
):
    try:
        client.completions.create(**arguments)
        check(what, False, "was accepted")
    except openai.APIStatusError as error:
        check(
            what,
            type(error) is kind and error.code and error.message,
            f"{error.status_code} {error.param} {error.code}",
        )

keyed = openai.OpenAI(base_url=f"{KEYED}/v1", api_key="wrong", max_retries=0)
try:
    keyed.models.list()
    check("a wrong key", False)
except openai.AuthenticationError as error:
    check("a wrong key", error.code == "invalid_api_key", error.status_code)
keyed = keyed.with_options(api_key=KEY)
try:
    for _ in range(1000):
        keyed.completions.create(prompt="a", model=MODEL, max_tokens=1)
    check("a rate limit", False)
except openai.RateLimitError as error:
    wait = error.response.headers["retry-after"]
    check("a rate limit", int(wait) >= 1 and error.code == "rate_limit_exceeded", f"retry after {wait} s")

with client.completions.create(prompt="a", model=MODEL, max_tokens=128, stream=True) as left:
    next(iter(left))
check("a stream may be left", True)


async def crowd() -> list[str]:
    """Sixteen at once."""
    async with openai.AsyncOpenAI(base_url=f"{OPEN}/v1", api_key="none") as many:
        answers = await asyncio.gather(*(many.completions.create(prompt="The state of", **greedy) for _ in range(16)))
        return [answer.choices[0].text for answer in answers]


check("sixteen at once", set(asyncio.run(crowd())) == {one.choices[0].text})
check.end(f"openai {openai.__version__} (Python)")
