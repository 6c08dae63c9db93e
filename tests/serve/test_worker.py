from __future__ import annotations

import threading
import time

import pytest
from serving import letters, ready

from fathom.errors import RequestError
from fathom.generate.generator import Generator
from fathom.generate.request import Request, SamplingParams
from fathom.serve.engine import End, Engine, EngineConfig, Progress
from fathom.serve.worker import Closed, QueueFull, Worker


class Ears:
    """Hears what a worker delivers."""

    def __init__(self) -> None:
        self.ends: dict[int, End] = {}
        self.tokens: dict[int, list[int]] = {}
        self.changed = threading.Condition()

    def __call__(self, progress: list[Progress]) -> None:
        with self.changed:
            for each in progress:
                self.tokens.setdefault(each.ticket, []).extend(output.token for output in each.outputs)
                if each.end is not None:
                    assert each.ticket not in self.ends
                    self.ends[each.ticket] = each.end
            self.changed.notify_all()

    def end(self, ticket: int) -> End:
        with self.changed:
            assert self.changed.wait_for(lambda: ticket in self.ends, timeout=60)
        return self.ends[ticket]


def request(seed: int = 0, max_tokens: int | None = 9) -> Request:
    return Request((3, 1, 4), SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True))


def test_requests_from_many_threads_get_their_own_answers() -> None:
    model, tokenizer, ears = ready(), letters(), Ears()
    worker = Worker(Engine(model, tokenizer), ears)
    worker.start()
    tickets: dict[int, int] = {}

    def ask(seed: int) -> None:
        tickets[seed] = worker.submit(request(seed))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, ticket in tickets.items():
        wanted = Generator(model, tokenizer).complete(request(seed))
        assert ears.end(ticket).completion.token_ids == wanted.token_ids == ears.tokens[ticket]
    assert worker.stop(5)
    assert not worker.running


def test_cancelled_requests_end_and_give_their_blocks_back() -> None:
    ears = Ears()
    worker = Worker(Engine(ready(max_position_embeddings=4096), letters()), ears)
    worker.start()
    ticket = worker.submit(request(max_tokens=None))
    worker.cancel(ticket)
    worker.cancel(999)
    assert ears.end(ticket).why == "cancelled"
    assert worker.stats().cache_blocks_used == 0
    worker.stop(5)


def test_a_full_queue_turns_away_and_says_when_to_come_again() -> None:
    worker = Worker(Engine(ready(), letters(), EngineConfig(max_num_seqs=1, max_num_queued=2)), Ears())
    for _ in range(3):
        worker.submit(request())  # it has not started: nobody takes them
    with pytest.raises(QueueFull) as full:
        worker.submit(request())
    assert 1 <= full.value.retry_after <= 60
    assert worker.stats().waiting == 3
    with pytest.raises(RequestError, match="no tokens"):
        worker.submit(Request(()))


def test_draining_finishes_what_was_taken_and_takes_nothing_more() -> None:
    ears = Ears()
    worker = Worker(Engine(ready(), letters()), ears)
    worker.start()
    tickets = [worker.submit(request(i)) for i in range(5)]
    worker.drain()
    with pytest.raises(Closed, match="shutting down"):
        worker.submit(request())
    assert worker.stop(30)
    assert [ears.ends[ticket].why for ticket in tickets] == ["length"] * 5


def test_stopping_ends_what_does_not_end_by_itself() -> None:
    ears = Ears()
    worker = Worker(Engine(ready(max_position_embeddings=1 << 16), letters(), EngineConfig(max_num_seqs=2)), ears)
    worker.start()
    ticket = worker.submit(request(max_tokens=None))
    assert not worker.stop(0.05)
    assert ears.end(ticket).why == "cancelled"
    assert not worker.running


def test_a_broken_engine_says_so_to_everyone() -> None:
    ears = Ears()
    engine = Engine(ready(), letters())

    def broken(*_: object) -> None:
        time.sleep(0.05)
        raise RuntimeError("a bug")

    engine.runner.run = broken  # type: ignore[method-assign, assignment]
    worker = Worker(engine, ears)
    worker.start()
    tickets = [worker.submit(request(i)) for i in range(3)]
    for ticket in tickets:
        end = ears.end(ticket)
        assert (end.why, end.error) == ("failed", "RuntimeError: a bug")
    assert not worker.running
    with pytest.raises(Closed, match="a bug"):
        worker.submit(request())
    worker.stop(1)
