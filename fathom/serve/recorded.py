"""Passes of one new token a row, recorded once as CUDA graphs and played again: a GPU is then handed one piece of work
instead of hundreds of kernels, whose launching is most of a small step.

A recording holds for one shape, B rows of at most n blocks, both rounded up to powers of two. What changes from step to
step lies in one tensor that it reads: tokens, places, slots to write to, the rows' blocks. Rows too many are padding:
they write to the spare block and are cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fathom.log import log
from fathom.model.attention.cache import Visibility
from fathom.model.native.layers import Where
from fathom.model.transformer import Transformer, Trunk
from fathom.serve.paged_cache import Pages, Rows

Play = Callable[[], Trunk]
Record = Callable[[Play], Play]
WARM_UP = 2  # passes before recording, in which kernels are chosen and memory is set aside


def cuda_graph() -> Record:
    """Recording by CUDA graphs that share their memory: only one is played at a time, and what it gives is copied."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Play) -> Play:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool):
                found = run()
        finally:  # a recording that fails leaves its own stream behind
            torch.cuda.set_stream(current)

        def play() -> Trunk:
            graph.replay()
            return found

        return play

    return record


class Recorded:
    """One shape: B rows of at most n blocks."""

    def __init__(
        self, model: Transformer, pages: Pages, layers: Sequence[int], rows: int, blocks: int, record: Record
    ) -> None:
        self.model, self.pages, self.layers, self.rows, self.blocks = model, pages, layers, rows, blocks
        device = pages.layers[0].device
        self.idle = [0, 0, pages.blocks * pages.size, 0, *[pages.blocks] * blocks]  # a row of padding
        self.numbers = torch.tensor([self.idle] * rows, device=device)
        self.play = record(self._run)

    def _run(self) -> Trunk:
        """The pass over what `numbers` has: of each row its token, its place, the slot, whether it is real, blocks."""
        tokens, places, slots, real, table = self.numbers.split([1, 1, 1, 1, self.blocks], dim=1)
        pages, seen = self.pages, self.blocks * self.pages.size
        rows = pages.rows([[pages.blocks] * self.blocks] * self.rows, [seen - 1] * self.rows, [1] * self.rows)
        mask = torch.arange(seen, device=places.device) <= places.unsqueeze(-1)
        vars(rows).update(  # in place of what it would work out from lists
            places=places, slots=slots.flatten(), gathered=table.flatten(), run=None,
            visible=Visibility(mask.unsqueeze(1), causal=False),
            where=Where(table.contiguous(), places.flatten() + 1, pages.size),
        )  # fmt: skip
        return self.model.trunk(tokens, places, caches=pages.view(self.layers, rows), real=real > 0)

    def __call__(self, batch: Rows, tokens: Sequence[int]) -> Trunk:
        """One pass with a new token of each row."""
        n, size, filled = self.blocks, self.pages.size, []
        for token, table, place in zip(tokens, batch.tables, batch.starts, strict=True):
            own = list(table[: place // size + 1])
            slot = own[place // size] * size + place % size
            filled.append([token, place, slot, 1, *own, *[self.pages.blocks] * (n - len(own))])
        filled += [self.idle] * (self.rows - len(filled))
        self.numbers.copy_(torch.tensor(filled))
        found, count = self.play(), len(tokens)
        reports = [
            r._replace(
                experts=r.experts[:count].clone(), weights=r.weights[:count].clone(), scores=r.scores[:count].clone(),
                real=None,
            )
            for r in found.routing
        ]  # fmt: skip
        return Trunk(found.hidden[:count].clone(), tuple(reports))


class Recordings:
    """Recordings of a model over a cache, each made when its shape is first wanted."""

    def __init__(self, model: Transformer, pages: Pages, layers: Sequence[int], record: Record) -> None:
        self.model, self.pages, self.layers, self.record = model, pages, layers, record
        self._made: dict[tuple[int, int], Recorded] = {}
        # what an n-gram memory recalls is worked out on the CPU, and a loop over experts asks how many rows each has
        self._works = model.memory is None and not any(moe.experts.loops for moe in model.moe_layers().values())

    def run(self, batch: Rows, texts: Sequence[Sequence[int]]) -> Trunk | None:
        """A pass over these rows; None: it has more than one new token a row, or recording failed (said once)."""
        if not self._works or batch.new != 1:
            return None
        shape = _power(len(texts)), _power(-(-batch.seen // self.pages.size))
        if shape not in self._made:
            try:
                self._made[shape] = Recorded(self.model, self.pages, self.layers, *shape, self.record)
            except RuntimeError as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                log.warning("decoding goes without CUDA graphs, recording failed: %s", reason)
                self._works = False
                return None
        return self._made[shape](batch, [token for (token,) in texts])


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
