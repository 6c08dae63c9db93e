"""Text and ends: what an answer makes of tokens, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import LETTERS, letters

from fathom.generate.answer import Answer
from fathom.generate.request import Request, SamplingParams
from fathom.generate.sampling import Choice
from fathom.tokenizer.train import byte

LETTERS_TOKENIZER, BYTES = letters(), byte()


def fill(answer: Answer, tokens: list[int]) -> list[str]:
    """The pieces of text, until the answer ends."""
    pieces = []
    for token in tokens:
        pieces.append(answer.take(Choice(token)).text)
        if answer.finished:
            break
    return pieces


def answer_to(window: int = 99, tokenizer: object = LETTERS_TOKENIZER, **options: object) -> Answer:
    return Answer(Request((1, 2, 3), SamplingParams.of(options)), tokenizer, window)  # type: ignore[arg-type]


def ids(text: str) -> list[int]:
    return LETTERS_TOKENIZER.encode(text)


def test_a_stop_text_across_tokens_is_cut_and_its_beginnings_are_held_back() -> None:
    answer = answer_to(stop=["cat"])
    assert fill(answer, ids("a cacatnap")) == ["a", " ", "", "", "ca", "", ""]
    done = answer.completion()
    assert (done.text, done.finish_reason, done.stop_reason) == ("a ca", "stop", "cat")
    assert LETTERS_TOKENIZER.decode(done.token_ids) == "a cacat"
    assert answer.left == 0


def test_the_earliest_stop_text_wins() -> None:
    answer = answer_to(stop=["zz", "b", "ab"])
    fill(answer, ids("xxabzz"))
    assert (answer.completion().text, answer.completion().stop_reason) == ("xx", "ab")  # both end at once
    answer = answer_to(stop=["é!", "é"], tokenizer=BYTES)
    fill(answer, BYTES.encode("xé!"))
    assert (answer.completion().text, answer.completion().stop_reason) == ("x", "é")


def test_what_was_held_back_comes_at_the_end() -> None:
    answer = answer_to(stop=["cat"], max_tokens=3)
    assert fill(answer, ids("xca")) == ["x", "", "ca"]
    assert answer.completion().finish_reason == "length"
    answer = answer_to(stop=["cat"])
    assert fill(answer, [*ids("xca"), LETTERS_TOKENIZER.eos_id]) == ["x", "", "", "ca"]
    assert (answer.completion().finish_reason, answer.completion().stop_reason) == ("stop", None)


def test_half_a_character_waits_for_its_end() -> None:
    answer = answer_to(tokenizer=BYTES, max_tokens=4)
    assert fill(answer, BYTES.encode("é☃")) == ["", "é", "", "�"]


def test_ends() -> None:
    eos = LETTERS_TOKENIZER.eos_id
    assert answer_to().turn.ends == {eos}
    assert answer_to(ignore_eos=True).turn.ends == set()
    assert answer_to(stop_token_ids=[4], ignore_eos=True).turn.ends == {4}
    answer = answer_to(stop_token_ids=[4])
    assert fill(answer, [7, 4]) == [LETTERS_TOKENIZER.decode([7]), ""]
    assert (answer.completion().finish_reason, answer.completion().stop_reason) == ("stop", 4)
    with pytest.raises(ValueError, match="ended"):
        answer.take(Choice(3))


@pytest.mark.parametrize(("window", "most", "room"), [(99, 5, 5), (7, 5, 4), (7, None, 4), (4, None, 1)])
def test_room(window: int, most: int | None, room: int) -> None:
    answer = answer_to(window, max_tokens=most)
    assert answer.left == room
    assert len(fill(answer, [1] * 99)) == room
    assert answer.completion().finish_reason == "length"


def test_stop_beats_length() -> None:
    answer = answer_to(stop=["b"], max_tokens=2)
    fill(answer, ids("ab"))
    assert answer.completion().finish_reason == "stop"


def test_text_of_the_first_min_tokens_is_not_searched() -> None:
    answer = answer_to(stop=["b"], min_tokens=3)
    fill(answer, ids("abbabz"))
    assert answer.completion().text == "abba"


def test_a_seed_is_drawn_where_none_is_given() -> None:
    assert answer_to(seed=3).turn.seed == 3
    assert answer_to().turn.seed != answer_to().turn.seed


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=25),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    assert set(text) <= set(LETTERS)
    answer = answer_to(stop=stops)
    pieces = fill(answer, [*ids(text), LETTERS_TOKENIZER.eos_id])
    ends = [at + len(s) for s in stops if (at := text.find(s)) >= 0]
    # the answer ends with the first token that completes a stop text
    seen = text[: min(ends)] if ends else text
    starts = [seen.find(s) for s in stops if s in seen]
    assert "".join(pieces) == (seen[: min(starts)] if starts else text)
    assert answer.completion().text == "".join(pieces)
