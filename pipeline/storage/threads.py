"""Threads for work that mostly waits for storage."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

THREADS = 16
AT_ONCE = 64 * THREADS  # items in work at once, so that memory does not grow with the number of items
QUICK_S = 0.002  # an item that takes less waits for nothing, as on a local disk: threads would only wait for each other
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], at_once: int = AT_ONCE) -> Iterator[Result]:
    """`map` in threads, for work that mostly waits for storage. Results are in the order of the items.

    Of very many items, those that are quick are worked on in this thread.

    Args:
        function: the work.
        items: what it is done to.
        at_once: the most results that wait in memory to be taken.
    """
    left = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while some := deque(islice(left, at_once)):
            quick = len(some) >= AT_ONCE
            while quick and some:
                started = time.perf_counter()
                result = function(some.popleft())
                quick = time.perf_counter() - started < QUICK_S
                yield result
            yield from pool.map(function, some)
