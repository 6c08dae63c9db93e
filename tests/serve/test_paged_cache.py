from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.generate.cache import Cache
from fathom.serve.paged_cache import Pages, Rows

WIDTHS = (3, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_rows_see_what_a_cache_of_their_own_would_show(rows: list[tuple[int, int]], size: int, chance: object) -> None:
    """Rows of any lengths, blocks in any order, against one plain cache a row."""
    generator = torch.Generator().manual_seed(1)
    order = list(range(len(rows) * 12))
    chance.shuffle(order)  # type: ignore[attr-defined]
    pages = Pages(WIDTHS, 1, len(order), size, torch.float32, "cpu")
    tables = [order[12 * i : 12 * i + -(-(start + count) // size)] for i, (start, count) in enumerate(rows)]
    plain = [Cache(WIDTHS, 1, 16, torch.float32, "cpu") for _ in rows]

    def write(starts: list[int], counts: list[int]) -> None:
        batch = Rows(tables, starts, counts, size, pages.blocks, torch.device("cpu"))
        new = [torch.randn(len(rows), batch.new, width, generator=generator) for width in WIDTHS]
        (layer,) = pages.view([0], batch)
        mask = layer.visible(batch.new, torch.device("cpu")).mask
        got = layer.append(*new)
        for i, (cache, count) in enumerate(zip(plain, counts, strict=True)):
            places = layer.places(batch.new, torch.device("cpu")).expand(len(rows), -1)[i, :count]
            assert places.tolist() == list(range(starts[i], starts[i] + count))
            wanted = cache.append(*(part[i : i + 1, :count] for part in new))
            for found, kept in zip(got, wanted, strict=True):
                assert torch.equal(found[i : i + 1, : cache.length], kept)
            if mask is not None:
                seen = mask.expand(len(rows), -1, -1, -1)[i, 0]
                assert seen.any(-1).all()
                for place in range(count):
                    assert seen[place].tolist() == [j <= starts[i] + place for j in range(batch.seen)]

    starts = [start for start, _ in rows]
    if all(starts):
        write([0] * len(rows), starts)
        write(starts, [count for _, count in rows])
    else:
        write([0] * len(rows), [count for _, count in rows])


def test_bytes_are_those_of_blocks_that_can_be_taken() -> None:
    pages = Pages(WIDTHS, 2, 7, 4, torch.bfloat16, "cpu")
    assert pages.bytes == 2 * 7 * 4 * 5 * 2
