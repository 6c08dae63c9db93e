from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run

from fathom.cli.chat import Chat
from fathom.cli.main import main
from fathom.errors import RequestError
from fathom.generate.generator import Generator
from fathom.generate.request import SamplingParams
from fathom.tokenizer.chat import STOPS


def piped(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str, *arguments: str) -> int:
    monkeypatch.setattr("fathom.load.load", lambda *_: tiny_run(folder, window=128))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", "RUN", "--max-tokens", "8", "--seed", "1", *arguments])


def chat(folder: Path, window: int = 128, **options: Any) -> Chat:
    run = tiny_run(folder, window=window)
    return Chat(Generator(run.model, run.tokenizer), SamplingParams(seed=1, stop=STOPS, **{"max_tokens": 8, **options}))


def test_it_answers_every_line_of_a_pipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped(monkeypatch, tmp_path, "hello\n\nagain\n") == 0
    out, err = capsys.readouterr()
    assert "base model" in err
    assert "> " not in out
    assert piped(monkeypatch, tmp_path, "hello\n/reset\nagain\n") == 0
    other = capsys.readouterr().out
    assert "The conversation is forgotten.\n" in other
    assert other.split("The")[0] == out[: len(other.split("The")[0])]  # same seed, same first answer
    assert piped(monkeypatch, tmp_path, "hello\n/reset\nagain\n", "--speculative", "--greedy") == 0


def test_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert piped(monkeypatch, tmp_path, "/help\n/no such\n/quit\nhello\n") == 0
    out = capsys.readouterr().out
    assert "/reset" in out
    assert "There is no /no; possible are /reset, /help and /quit." in out
    assert out.count("\n") == 5  # nothing after /quit


def test_the_conversation_is_what_the_model_sees(tmp_path: Path) -> None:
    talk = chat(tmp_path)
    talk.answer("one")
    first = talk.messages[1]["content"]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    prompts = []
    begin = talk.generator.begin
    talk.generator.begin = lambda request: prompts.append(request) or begin(request)  # type: ignore[method-assign,func-returns-value]
    talk.answer("two")
    seen = talk.generator.tokenizer.decode(prompts[0].prompt_ids)
    assert seen == f"User: one\nAssistant: {first}\nUser: two\nAssistant:"
    assert prompts[0].params.stop == STOPS


def test_the_oldest_turns_are_dropped(tmp_path: Path) -> None:
    talk = chat(tmp_path, window=64)
    for text in ("first", "second", "third", "fourth"):
        talk.answer(text)
        assert len(talk.request().prompt_ids) + 8 <= 64
    assert talk.messages[0]["role"] == "user"
    assert talk.messages[0]["content"] != "first"
    assert talk.messages[-2]["content"] == "fourth"


def test_what_is_too_long_by_itself_is_refused_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = chat(tmp_path)
    talk.answer("one")
    before = list(talk.messages)
    with pytest.raises(RequestError, match="window of 128 has room for 120"):
        talk.answer("x" * 120)
    assert talk.messages == before
    assert piped(monkeypatch, tmp_path, "x" * 120 + "\nhello\n") == 0
    assert "That is too long" in capsys.readouterr().out


def test_an_interrupt_ends_an_answer_and_keeps_what_came(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = chat(tmp_path, logit_bias={20: 100.0}, max_tokens=60)
    run = talk.generator.run

    def interrupted(answer: Any) -> Iterator[Any]:
        for number, output in enumerate(run(answer)):
            if number == 3:
                raise KeyboardInterrupt
            yield output

    talk.generator.run = interrupted  # type: ignore[method-assign]
    talk.answer("one")
    said = talk.messages[-1]["content"]
    assert len(said) == 3
    assert capsys.readouterr().out == said + "\n"
    talk.generator.run = run  # type: ignore[method-assign]
    talk.answer("two")  # and it goes on


def test_a_terminal_is_asked_and_left_by_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from fathom.cli.chat import heard

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked: list[str] = []
    answers: list[Any] = ["hello", KeyboardInterrupt(), EOFError()]

    def typed(prompt: str) -> str:
        asked.append(prompt)
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    assert [heard(), heard(), heard()] == ["hello", "", None]
    assert asked == ["> "] * 3
