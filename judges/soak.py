"""Many streams at once for minutes, with clients that hang up, send nonsense and use stop texts: does anything leak, is
any answer wrong, does every stream end?

    python judges/soak.py RUN [--streams 64] [--seconds 180]

Serves RUN on a free port of this machine. What every request should get is asked of the reference loop beforehand. At
the end the server must hold no blocks and no requests, as many threads as at the start, and its memory must not have
grown in the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

NONSENSE: list[tuple[str, bytes, int]] = [
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}', 400),
    ("/v1/completions", b'{"prompt": "a", "best_of": 9}', 400),
    ("/v1/completions", b'{"prompt": "a", "unheard_of": 1}', 400),
    ("/v1/completions", b'{"model": "none", "prompt": "a"}', 404),
    ("/v1/chat/completions", b'{"messages": [{"role": "wizard", "content": "x"}]}', 400),
    ("/v1/chat/completions", b'{"messages": "x"}', 400),
    ("/generate", b'{"prompt": 5}', 400),
    ("/nowhere", b"{}", 404),
]


@dataclass
class Seen:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    memory: list[int] = field(default_factory=list)
    most_blocks: float = 0.0


def cases(run: str, count: int) -> list[tuple[dict[str, Any], str, str]]:
    """Requests of all kinds: (body, the text that the reference loop gives, its finish_reason)."""
    from fathom.generate.generator import Generator
    from fathom.generate.request import SamplingParams
    from fathom.load import load

    opened = load(run)
    generator, chance = Generator(opened.model, opened.tokenizer), random.Random(1)
    words = ["the", "state", "of", "union", "congress", "people", "year", "government", "war", "peace"]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "top_k": 20},
        {"temperature": 0, "stop": [" the"]}, {"temperature": 1.1, "min_p": 0.05, "stop": ["e ", ". "]},
        {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    ]  # fmt: skip
    found = []
    for number in range(count):
        prompt = " ".join(chance.choice(words) for _ in range(chance.choice([1, 3, 9, 40])))
        options = {**kinds[number % len(kinds)], "max_tokens": chance.choice([1, 7, 40, 90]), "seed": number}
        done = generator.complete(generator.request(prompt, SamplingParams.of(options)))
        found.append(({"prompt": prompt, **options}, done.text, str(done.finish_reason)))
    return found


async def one(client: httpx.AsyncClient, chance: random.Random, pool: list[Any], seen: Seen) -> None:
    """One client's turn: nonsense, a whole answer, a stream, or a stream that is left."""
    way = chance.random()
    if way < 0.1:
        path, body, status = chance.choice(NONSENSE)
        answer = await client.post(path, content=body, headers={"content-type": "application/json"})
        seen.counts["nonsense"] += 1
        if answer.status_code != status:
            seen.wrong.append(f"{path} {body!r}: {answer.status_code}, not {status}: {answer.text[:200]}")
        return
    body, text, reason = chance.choice(pool)
    if way < 0.25:
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            seen.counts[f"status {answer.status_code}"] += 1
            return
        choice = answer.json()["choices"][0]
        compare(seen, body, (choice["text"], choice["finish_reason"]), (text, reason))
        seen.counts["whole"] += 1
        return
    leave = chance.randint(0, 12) if way < 0.45 else None
    got, ended, why, pieces = "", False, None, 0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            seen.counts[f"status {answer.status_code}"] += 1
            return
        async for line in answer.aiter_lines():
            if leave is not None and pieces >= leave:
                seen.counts["left"] += 1
                return
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                break
            for choice in json.loads(line[6:])["choices"]:
                got, why, pieces = got + choice["text"], choice["finish_reason"] or why, pieces + 1
    seen.counts["streamed"] += 1
    seen.tokens += pieces
    if not ended:
        seen.wrong.append(f"{body}: the stream broke off after {got!r}")
    else:
        compare(seen, body, (got, why), (text, reason))


def compare(seen: Seen, body: Any, got: tuple[Any, Any], wanted: tuple[str, str]) -> None:
    """Note a wrong answer."""
    if got != wanted:
        seen.wrong.append(f"{body}: {got}, not {wanted}")


async def stream_of_turns(base: str, number: int, end: float, pool: list[Any], seen: Seen) -> None:
    """One of the many: turn after turn."""
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=base, timeout=120) as client:
        while time.monotonic() < end:
            try:
                await one(client, chance, pool, seen)
            except httpx.HTTPError as error:
                seen.wrong.append(f"client {number}: {type(error).__name__}: {error}")
            await asyncio.sleep(chance.random() * 0.2)


def gauge(text: str, name: str) -> float:
    """The sum of a metric's samples."""
    lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def watch(base: str, process: psutil.Process, end: float, seen: Seen) -> None:
    """Memory and blocks, once a second."""
    async with httpx.AsyncClient(base_url=base, timeout=60) as client:
        while time.monotonic() < end:
            seen.memory.append(process.memory_info().rss)
            usage = gauge((await client.get("/metrics")).text, "vllm:kv_cache_usage_perc")
            seen.most_blocks = max(seen.most_blocks, usage)
            await asyncio.sleep(1)


async def settled(base: str) -> dict[str, float]:
    """The gauges once nothing is under way, or after ten seconds."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    found: dict[str, float] = {}
    async with httpx.AsyncClient(base_url=base, timeout=60) as client:
        for _ in range(100):
            text = (await client.get("/metrics")).text
            found = {name: gauge(text, name) for name in names}
            if not any(found.values()):
                break
            await asyncio.sleep(0.1)
    return found


async def soak(base: str, process: psutil.Process, streams: int, seconds: float, pool: list[Any]) -> list[str]:
    """Run all; what was wrong, in words."""
    seen, threads, end = Seen(), process.num_threads(), time.monotonic() + seconds
    turns = [stream_of_turns(base, number, end, pool, seen) for number in range(streams)]
    await asyncio.gather(watch(base, process, end, seen), *turns)
    left = await settled(base)
    half = seen.memory[len(seen.memory) // 2 :]
    third = max(1, len(half) // 3)
    grown = (sum(half[-third:]) - sum(half[:third])) / third / 2**20
    print(f"{streams} clients for {seconds:.0f} s: {dict(seen.counts)}, {seen.tokens} tokens streamed")
    print(f"cache at its fullest: {seen.most_blocks:.1%}; in the end: {left}")
    print(f"threads: {threads} at first, {process.num_threads()} in the end")
    first, last = seen.memory[0] >> 20, seen.memory[-1] >> 20
    print(f"memory: {first} MiB at first, {last} in the end, {grown:+.1f} in the second half")
    problems = [*seen.wrong[:10]]
    if len(seen.wrong) > 10:
        problems.append(f"... and {len(seen.wrong) - 10} more")
    if any(left.values()):
        problems.append(f"something is still held: {left}")
    if process.num_threads() > threads + 4:
        problems.append("threads were left behind")
    if grown > 24:
        problems.append("memory grows")
    return problems


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Serve, soak, stop; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    given = parser.parse_args()
    pool, port = cases(given.run, 48), free_port()
    command = [sys.executable, "-m", "fathom", "serve", given.run, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(base + "/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        problems = asyncio.run(soak(base, psutil.Process(server.pid), given.streams, given.seconds, pool))
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
    if code:
        problems.append(f"the server left with exit code {code}")
    for problem in problems:
        print("WRONG:", problem)
    print("nothing wrong" if not problems else f"{len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
