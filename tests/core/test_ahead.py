"""Items made ready in threads, ahead of their use."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from stages.core.execution.ahead import MOST_THREADS, ahead, threads_beside


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_results_come_in_the_order_of_their_items(num_threads: int) -> None:
    def late(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert list(ahead(late, iter(range(40)), num_threads)) == [n * n for n in range(40)]
    assert list(ahead(late, [], num_threads)) == []


def test_items_are_made_ready_beside_their_use_and_not_without_bound() -> None:
    drawn, made = [], threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    def make(item: int) -> int:
        made.release()
        return item

    results = ahead(make, items(), 2)
    assert next(results) == 0
    for _ in range(5):  # the first and four ahead of it, while nobody asks for more
        assert made.acquire(timeout=20)
    assert len(drawn) == 5
    results.close()
    assert len(drawn) == 5


@pytest.mark.parametrize("num_threads", [0, 3])
def test_an_error_is_raised_at_its_items_turn(num_threads: int) -> None:
    def picky(item: int) -> int:
        if item == 3:
            raise ValueError("no image")
        return item

    found = []
    with pytest.raises(ValueError, match="no image"):
        for result in ahead(picky, range(10), num_threads):
            found.append(result)
    assert found == [0, 1, 2]


def test_no_thread_takes_a_core_from_a_network_on_the_cpu() -> None:
    assert threads_beside("cpu") == 0
    assert 1 <= threads_beside("cuda") <= MOST_THREADS
