"""Progress: a bar with percentage and time left on a terminal, plain lines with the time elsewhere."""

import threading
import time
from types import TracebackType
from typing import Literal

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipeline import storage
from pipeline.console import console, has_bars, say_at
from pipeline.workers import metrics
from pipeline.workers.waiting import unmet

LINE_EVERY_S = 10.0
IDLE_S = 60.0  # without an advance before a line says what is waited for
KNOWN_S = 30.0  # of advances before a rate is said: the first ones come in bursts, after workers have started


class Stage:
    """One stage of a run, as its user sees it.

    Args:
        name: of the stage.
        total: amount of work, in `unit` or any other. The percentage is a share of it.
        done: work that an earlier run already did.
        unit: of the rate in a log; None says none.
    """

    def __init__(self, name: str, total: float, done: float = 0.0, unit: Literal["bytes", "pairs"] | None = None):
        self.name, self.total, self.done, self.unit = name, max(total, 1e-9), done, unit
        self._start = self._last_line = self._last_advance = time.monotonic()
        self._first: tuple[float, float] | None = None  # when the first work was done, and how much was done then
        self._bar: Progress | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "Stage":
        if has_bars():
            columns = (
                TextColumn("{task.description:<8}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, note="starting")
            self._bar.update(self._task, completed=self.done)
        threading.Thread(target=self._watch, daemon=True, name=f"watch {self.name}").start()
        return self

    def advance(self, amount: float, note: str = "") -> None:
        """Report `amount` more work done."""
        storage.check_guard()  # a run that has lost its folder ends here, not only at its next write
        self.done += amount
        metrics.share(self.name, self.done / self.total)
        if self.unit == "pairs":
            metrics.pairs(self.name, amount)
        now = self._last_advance = time.monotonic()
        self._first = self._first or (now, self.done)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            facts = [f"{min(1.0, self.done / self.total):4.0%}", *self._pace(now), *([note] if note else [])]
            say_at(f"{self.name:<8} {', '.join(facts)}")

    def _pace(self, now: float) -> list[str]:
        """Rate and time left, once work has been seen for long enough to know them."""
        at, then = self._first or (now, self.done)
        if now - at < KNOWN_S or self.done <= then:
            return []
        rate = (self.done - then) / (now - at)
        said = {"bytes": f"{decimal(int(rate))}/s", "pairs": f"{rate:.4g} pairs/s", None: ""}[self.unit]
        return [*([said] if said else []), f"{duration((self.total - self.done) / rate)} left"]

    def _watch(self) -> None:
        """Say what is waited for while no work gets done: a run whose workers find no room looks like one that hangs."""
        while not self._ended.wait(IDLE_S / 4):
            now = time.monotonic()
            if now - max(self._last_advance, self._last_line) >= IDLE_S and (what := unmet()):
                self._last_line = now
                idle = duration(now - self._last_advance)
                say_at(f"{self.name:<8} waiting for resources: no node has room for {what}; nothing done for {idle}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            say_at(f"{self.name:<8} done in {time.monotonic() - self._start:.1f} s")


def duration(seconds: float) -> str:
    """A time as text: in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
