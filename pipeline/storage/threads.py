"""Threads for work that mostly waits for storage."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

THREADS = 16
AT_ONCE = 64 * THREADS  # items in work at once, so that memory does not grow with the number of items
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], at_once: int = AT_ONCE) -> Iterator[Result]:
    """`map` in threads, for work that mostly waits for storage. Results are in the order of the items.

    Args:
        function: the work.
        items: what it is done to.
        at_once: the most results that wait in memory to be taken.
    """
    left = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while some := list(islice(left, at_once)):
            yield from pool.map(function, some)
