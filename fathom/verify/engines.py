"""The same model in the engines that people use: the same greedy tokens, and how far off the log-probabilities are.

The model is written out as each engine wants it (a Hugging Face folder, a GGUF file in float32) unless such a place is
given, and every engine runs in a process of its own (`inside.py`), by the interpreter that has it.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fathom.errors import ConfigError, UserError
from fathom.generate.cache import caches_for
from fathom.hub.gguf import export_gguf
from fathom.hub.huggingface import export, weights_of
from fathom.hub.lint import lint
from fathom.model.transformer import Transformer
from fathom.runtime.seed import generator as chance
from fathom.tokenizer.tokenizer import Tokenizer

LENGTH = 64  # greedy tokens after each prompt
BEST = 20  # likeliest tokens that are compared at each step
ALLOWED = 2e-3  # nats; float32 sums in another order, through all layers
SECONDS = 1800.0  # that an engine may take
TEXT = "The people of the United States"


@dataclass(frozen=True)
class Engine:
    """name; module: what is imported; wants: the format it reads; install: how to get it."""

    name: str
    module: str
    wants: Literal["hf", "gguf"]
    install: str


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("transformers", "transformers", "hf", 'pip install "fathom-lm[verify]"'),
        Engine("llama.cpp", "xllamacpp", "gguf", 'pip install "fathom-lm[verify]"'),
        Engine("mlx-lm", "mlx_lm", "hf", 'pip install "fathom-lm[verify]"'),
        Engine(
            "vllm",
            "vllm",
            "hf",
            "it pins other versions, so give it an environment of its own (docs/checkpoints.md) and then "
            "--engine vllm=PYTHON",
        ),
    )
}


@dataclass(frozen=True)
class Chosen:
    """An engine and the interpreter that has it; named: whether somebody asked for it by name."""

    engine: Engine
    python: str = sys.executable
    named: bool = False


def chosen(words: Sequence[str]) -> list[Chosen]:
    """`NAME`, `NAME=PYTHON` or `all` -> engines, in the order of the table; none given: all. ConfigError: no such
    engine or interpreter."""
    found = {} if words and "all" not in words else {name: Chosen(engine) for name, engine in ENGINES.items()}
    for word in words:
        name, _, python = word.partition("=")
        if word == "all":
            continue
        if name not in ENGINES:
            raise ConfigError(f"there is no engine {name}; possible are all, {', '.join(ENGINES)}")
        python = os.path.expanduser(python)
        if python and not (Path(python).is_file() and os.access(python, os.X_OK)):
            raise ConfigError(f"--engine {word}: {python} is no interpreter; give the path of one, as .venv/bin/python")
        found[name] = Chosen(ENGINES[name], python or sys.executable, named=True)
    return [found[name] for name in ENGINES if name in found]


@dataclass(frozen=True)
class Parity:
    """How an engine did.

    version    of the engine; None: not installed
    same       greedy tokens that are the same, counted to the first that is not, over all prompts
    tokens     of how many
    tied       where they part, the two tokens are as likely as each other, as far as the error tells
    error      the largest difference of a log-probability, nats; None: nothing could be compared
    allowed    the error that float32 explains; None: the weights were narrowed, and the error is told only
    problem    why the engine gave no tokens: how to install it, or what it said
    named      somebody asked for this engine by name, so that a problem is a failure
    """

    engine: str
    version: str | None = None
    same: int = 0
    tokens: int = 0
    tied: bool = False
    error: float | None = None
    allowed: float | None = ALLOWED
    problem: str | None = None
    named: bool = False

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the engine's having the same model."""
        if self.problem is not None:
            return not self.named
        if self.allowed is None:
            return True
        close = self.error is not None and self.error <= self.allowed
        return close and (self.same == self.tokens or self.tied)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        return {**asdict(self), "error": error, "passed": self.passed}


# --- ours ------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """A prompt, our greedy tokens after it, and the log-probabilities (n, V) that each was chosen from."""

    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor


@torch.inference_mode()
def continued(model: Transformer, prompt: Sequence[int], length: int) -> Continuation:
    """Continue a prompt greedily, past any end of text."""
    device = model.embed_tokens.weight.device
    caches = caches_for(model.config, len(model.layers), 1, len(prompt) + length, torch.float32, device)
    fresh, tokens, rows = list(prompt), list[int](), list[Tensor]()
    for _ in range(length):
        row = model(torch.tensor([fresh], device=device), caches=caches)[0, -1].float().log_softmax(-1).cpu()
        fresh = [int(row.argmax())]
        tokens += fresh
        rows.append(row)
    return Continuation(list(prompt), tokens, torch.stack(rows))


def prompts_for(model: Transformer, tokenizer: Tokenizer | None) -> list[list[int]]:
    """The end of a text, a sentence, and a few tokens of all kinds; all leave room in the window."""
    size = model.embed_tokens.num_embeddings
    known = size if tokenizer is None else min(size, tokenizer.vocab_size)
    room = max(1, model.config.max_position_embeddings // 4)
    drawn = torch.randint(known, (min(7, room),), generator=chance(0, "prompts")).tolist()
    if tokenizer is None:
        return [drawn[:1], drawn]
    try:
        sentence = tokenizer.encode(TEXT)
    except UserError:  # a tokenizer of another alphabet
        sentence = []
    return [ids for ids in ([tokenizer.eos_id], sentence[:room], drawn) if ids]


def letter_of(tokenizer: Tokenizer) -> int:
    """A token that is one whole character: what llama.cpp is made to say, so that it answers."""
    letters = (
        i for i, text in enumerate(tokenizer.token_bytes) if len(text) == 1 and text.isalpha() and text.isascii()
    )
    return next(letters, 0)


# --- theirs ------------------------------------------------------------


def parities(
    model: Transformer,
    tokenizer: Tokenizer | None,
    engines: Sequence[Chosen],
    *,
    folder: Path | None = None,
    gguf: Path | None = None,
    allowed: float | None = ALLOWED,
    length: int = LENGTH,
) -> Iterator[Parity]:
    """Compare a model in eval mode with each engine, one after the other.

    folder, gguf: the model as it was exported; where none is given it is exported in float32, without MTP, for the
    time of the comparison. allowed: the largest error, or None where the files were narrowed.
    """
    if not engines:
        return
    prompts = prompts_for(model, tokenizer)
    length = max(1, min(length, model.config.max_position_embeddings - max(map(len, prompts))))
    ours = [continued(model, prompt, length) for prompt in prompts]
    with tempfile.TemporaryDirectory(prefix="fathom-") as scratch:
        places = _Places(model, tokenizer, Path(scratch), {"hf": folder, "gguf": gguf})
        for each in engines:
            yield _parity(each, places, ours, letter_of(tokenizer) if tokenizer else 0, allowed, Path(scratch))


class _Places:
    """Where the model is in each format; made when first wanted."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None, scratch: Path, known: dict[str, Path | None]
    ) -> None:
        self.model, self.tokenizer, self.scratch, self.known = model, tokenizer, scratch, known

    def of(self, form: str) -> Path:
        """The folder or file. UserError: the model cannot be written so."""
        path = self.known[form]
        if path is not None:
            return path
        config, weights = self.model.config, weights_of(self.model)
        if form == "hf":
            path = export(config, weights, self.scratch / "hf", self.tokenizer, mtp=False, dtype="float32").folder
        else:
            path = export_gguf(config, weights, self.scratch / "model.gguf", self.tokenizer, kind="f32")
        self.known[form] = path
        return path


def _parity(
    each: Chosen, places: _Places, ours: list[Continuation], letter: int, allowed: float | None, scratch: Path
) -> Parity:
    engine, own = each.engine, each.python == sys.executable
    absent = Parity(engine.name, problem=f"not installed: {engine.install}", named=each.named)
    if own and find_spec(engine.module) is None:
        return absent
    try:
        path = places.of(engine.wants)
    except UserError as error:
        return Parity(engine.name, problem=f"cannot be exported for it: {error}", named=each.named)
    job = {
        "engine": engine.name,
        "path": str(path.resolve()),
        "prompts": [run.prompt for run in ours],
        "length": len(ours[0].tokens),
        "best": BEST,
        "letter": letter,
    }
    answer, problem = ask(each.python, job, scratch)
    if problem is not None:
        return Parity(engine.name, problem=f"{problem}{known(engine, path)}", named=each.named)
    if "missing" in answer:
        return absent
    same, tied, off = compared(ours, answer["runs"])
    total = sum(len(run.tokens) for run in ours)
    return Parity(engine.name, answer["version"] or "?", same, total, tied, off, allowed, named=each.named)


def known(engine: Engine, path: Path) -> str:
    """What is known to stop an engine at a folder, and the remedy; empty if nothing is."""
    if engine.wants != "hf":
        return ""
    keys = json.loads((path / "config.json").read_text(encoding="utf-8"))
    found = [f for f in lint(keys) if not f.silent and engine.name in f.engine.lower()]
    return "".join(f" ({finding.what}; {finding.remedy})" for finding in found)


def ask(python: str, job: dict[str, Any], scratch: Path) -> tuple[dict[str, Any], str | None]:
    """Run `inside.py` with an interpreter: (answer, None), or ({}, what went wrong)."""
    question, reply = scratch / "job.json", scratch / "answer.json"
    question.write_text(json.dumps(job), encoding="utf-8")
    reply.unlink(missing_ok=True)
    command = [python, str(Path(__file__).with_name("inside.py")), str(question), str(reply)]
    threads = str(torch.get_num_threads())  # more would wait for each other where ours are held back
    alone = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": threads}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env={**os.environ, **alone}, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer after {SECONDS / 60:.0f} minutes"
    except OSError as error:
        return {}, f"{python} cannot be run: {error.strerror or error}"
    if done.returncode == 0 and reply.is_file():
        return json.loads(reply.read_text(encoding="utf-8")), None
    return {}, f"it stopped: {last_words(done.stderr, done.returncode)}"


def last_words(text: str, code: int) -> str:
    """Of what a program wrote before it failed, the line that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"^(\[\w+\]: )?\w*(Error|Exception)\b|ASSERT|error:", line)]
    said = re.sub(r"^\[\w+\]: ", "", (telling or lines or ["nothing was said"])[-1])
    return f"{said[:300]} (signal {-code})" if code < 0 else said[:300]


def compared(ours: Iterable[Continuation], theirs: Iterable[dict[str, Any]]) -> tuple[int, bool, float | None]:
    """(tokens that are the same, whether every parting is a tie, the largest difference of a log-probability).

    Steps are compared up to the first token that is not the same, that one included: from there on the texts differ.
    """
    same, partings, error, any_seen = 0, list[float](), 0.0, False
    for mine, other in zip(ours, theirs, strict=True):
        for step, (token, row) in enumerate(zip(mine.tokens, mine.logprobs, strict=True)):
            told = {int(i): float(value) for i, value in other["logprobs"][step]}
            for i, value in told.items():
                if not math.isfinite(value):
                    continue  # a probability that was rounded to 0
                error, any_seen = max(error, abs(float(row[i]) - value)), True
            if other["tokens"][step] != token:
                partings.append(float(row[token] - row[other["tokens"][step]]))
                break
            same += 1
    tied = all(gap <= 2 * max(error, 1e-6) for gap in partings)
    return same, tied and bool(partings), error if any_seen else None
