"""How busy the models of `embed` are, and what they wait for: measured in each actor, summed and said by the driver."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.console import say
from pipeline.stages.embed.rows import Busy, Embedded

# Of an actor: one is in the model, one hands the next part to it, the others write. Storage takes longer to take a part than a
# GPU to compute it.
THREADS = {"cpu": 3, "cuda": 8}
ENOUGH_S = 60.0  # of an actor, before its waiting is worth a warning
IDLE = 0.2  # share of the time that models wait for readers from which on the run says so


class Visit:
    """A part in an actor."""

    def __init__(self, arrived: float, full: bool, reading: float):
        self.arrived, self.full, self.reading = arrived, full, reading


class Meter:
    """Measures what the model of an actor does between two parts.

    Args:
        threads: of the actor.
    """

    def __init__(self, threads: int) -> None:
        self._threads, self._lock, self._inside, self._ended = threads, threading.Lock(), 0, math.inf

    @contextmanager
    def visit(self, reading: float) -> Iterator[Visit]:
        """A part is in the actor within the body. `reading` is what a reader took for it."""
        with self._lock:
            visit = Visit(time.perf_counter(), self._inside == self._threads - 1, reading)
            self._inside += 1
        try:
            yield visit
        finally:
            with self._lock:
                self._inside -= 1

    def busy(self, visit: Visit, seconds: float, ended: float) -> Busy:
        """What the model did for a part and before it, given the seconds that it worked and when it had done so.

        Where all threads were taken when the part came, it came because one of them had written its part.
        """
        with self._lock:
            idle = max(0.0, min(ended - seconds, visit.arrived) - self._ended)
            self._ended = ended
        return Busy(seconds, 0.0 if visit.full else idle, idle if visit.full else 0.0, visit.reading)


class Usage:
    """Sums what the actors measured.

    Args:
        gpus: whether they are on GPUs.
    """

    def __init__(self, gpus: bool):
        self._what, self._gpus = "GPUs" if gpus else "models", gpus
        self._sum, self._pairs = Busy(), 0

    def add(self, part: Embedded) -> None:
        """Count a part."""
        self._sum = Busy(*(a + b for a, b in zip(self._sum, part.busy, strict=True)))
        self._pairs += part.pairs

    def lines(self) -> list[str]:
        """What to say about all parts: how busy, and a warning if readers are the limit."""
        model, readers, storage, reading = self._sum
        whole = model + readers + storage
        if not self._pairs or not model:
            return []
        shares = f"waiting for readers {readers / whole:.0%}, for storage {storage / whole:.0%}"
        said = [f"{self._what} busy {model / whole:.0%}, {shares}"]
        if readers > IDLE * whole and whole > ENOUGH_S:
            needed = math.ceil(reading / model)
            rates = f"{self._pairs / reading:.0f} pairs/s a reader, {self._pairs / model:.0f} a {self._what.removesuffix('s')}"
            advice = f"{needed} readers, a CPU core each, keep one busy" if self._gpus else f"{needed} readers keep one busy"
            said.append(f"readers are the limit: {rates}; {advice}; embed.resize: fast makes readers faster")
        return said

    def say(self) -> None:
        """Say it."""
        for line in self.lines():
            say(line)
