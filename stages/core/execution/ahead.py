"""Work of the CPU that a GPU need not wait for: items are made ready in threads, ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Ready = TypeVar("Ready")

MOST_THREADS = 8


def threads_beside(device_type: str) -> int:
    """How many threads work ahead: none beside a network on the CPU, whose cores they would take."""
    return 0 if device_type == "cpu" else min(MOST_THREADS, os.cpu_count() or 1)


def ahead(
    make_ready: Callable[[Item], Ready], items: Iterable[Item], num_threads: int
) -> Iterator[Ready]:
    """What `make_ready` gives for each item, in order; up to twice as many as threads are made ahead.

    Items are drawn one by one, by the caller's own thread. An error is raised where its item's turn
    comes. With 0 threads each item is made ready when it is asked for.
    """
    if not num_threads:
        yield from map(make_ready, items)
        return
    with ThreadPoolExecutor(num_threads) as threads:
        waiting: deque[Future[Ready]] = deque()
        try:
            for item in items:
                waiting.append(threads.submit(make_ready, item))
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
