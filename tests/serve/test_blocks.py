from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.serve.blocks import Blocks


def fill(blocks: Blocks, text: list[int], root: int = -1) -> list[int]:
    """What a sequence does with a text that it reads as a whole."""
    found, node = blocks.match(text, root)
    fresh = blocks.take(blocks.needed(len(text)) - len(found))
    assert fresh is not None
    held = found + fresh
    for number in range(len(found), len(text) // blocks.size):
        start = number * blocks.size
        node = blocks.remember(held[number], text[start : start + blocks.size], node)
    return held


def test_what_was_read_is_found_while_held_and_after() -> None:
    blocks = Blocks(7, 3)
    text = [1, 2, 3, 4, 5, 6, 7]
    held = fill(blocks, text)
    assert (blocks.used, blocks.free) == (3, 4)
    again, _ = blocks.match([1, 2, 3, 4, 5, 6, 9, 9])
    assert again == held[:2]
    assert blocks.used == 3
    blocks.release(again)
    blocks.release(held)
    assert blocks.used == 0
    found, _ = blocks.match(text)
    assert found == held[:2]
    blocks.release(found)


def test_one_token_is_always_left_to_compute() -> None:
    blocks = Blocks(7, 3)
    blocks.release(fill(blocks, [1, 2, 3, 4, 5, 6]))
    assert len(blocks.match([1, 2, 3, 4, 5, 6])[0]) == 1
    assert len(blocks.match([1, 2, 3, 4, 5, 6, 7])[0]) == 2


def test_the_same_tokens_after_others_or_under_another_root_are_other_text() -> None:
    blocks = Blocks(9, 2)
    blocks.release(fill(blocks, [1, 2, 3, 4, 5]))
    assert blocks.match([9, 9, 3, 4, 5])[0] == []
    assert blocks.match([1, 2, 3, 4, 5], root=-2)[0] == []
    assert len(blocks.match([1, 2, 3, 4, 5])[0]) == 2


def test_room_is_made_from_the_end_of_what_was_released_longest_ago() -> None:
    blocks = Blocks(4, 2)
    blocks.release(fill(blocks, [1, 2, 3, 4, 5]))  # two blocks are known, the third was not full
    taken = blocks.take(3)
    assert taken is not None
    assert len(blocks.match([1, 2, 3, 4, 5])[0]) == 1  # [3, 4] went, [1, 2] is still there
    assert blocks.take(1) is None
    assert blocks.used == 4


def test_without_reuse_nothing_is_known() -> None:
    blocks = Blocks(4, 2, reuse=False)
    blocks.release(fill(blocks, [1, 2, 3]))
    assert blocks.match([1, 2, 3])[0] == []


def test_releasing_what_nobody_holds_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nobody holds it"):
        Blocks(4, 2).release([1])
    with pytest.raises(ValueError, match="hold nothing"):
        Blocks(0, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.booleans()), max_size=30))
def test_blocks_never_hold_two_texts(turns: list[tuple[list[int], bool]]) -> None:
    """Against a model that writes down what each block has: found blocks hold the text asked for, in every history."""
    blocks, written, open_ = Blocks(5, 2), dict[int, tuple[int, ...]](), list[list[int]]()
    for text, keep in turns:
        found, _ = blocks.match(text)
        for number, block in enumerate(found):
            assert written[block] == tuple(text[: (number + 1) * 2])
        blocks.release(found)
        if blocks.free < blocks.needed(len(text)):
            if open_:
                blocks.release(open_.pop(0))
            continue
        held = fill(blocks, text)
        for number in range(len(text) // 2):
            written[held[number]] = tuple(text[: (number + 1) * 2])
        for block in held[len(text) // 2 :]:
            written.pop(block, None)
        assert len(set(held)) == len(held)
        open_.append(held)
        if not keep:
            blocks.release(open_.pop())
        assert blocks.used == len({block for held in open_ for block in held})
    for held in open_:
        blocks.release(held)
    assert blocks.free == 5
