"""A time after which stages start no further shard. What they have begun to write they finish."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_until: ContextVar[float | None] = ContextVar("until", default=None)  # of time.monotonic; None for ever


@contextmanager
def until(moment: float | None) -> Iterator[None]:
    """In the body, stages of this thread stop between shards after a moment of `time.monotonic`."""
    before = _until.set(moment)
    try:
        yield
    finally:
        _until.reset(before)


def passed() -> bool:
    """Whether it is time to stop."""
    moment = _until.get()
    return moment is not None and time.monotonic() >= moment
