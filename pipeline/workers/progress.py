"""Progress: a bar with percentage and time left on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipeline import storage
from pipeline.console import console, has_bars, say

LINE_EVERY_S = 10.0


class Stage:
    """One stage of a run, as its user sees it.

    Args:
        name: of the stage.
        total: amount of work, in any unit. The percentage is a share of it.
        done: work that an earlier run already did.
    """

    def __init__(self, name: str, total: float, done: float = 0.0):
        self.name, self.total, self.done = name, max(total, 1e-9), done
        self._at_start, self._start, self._last_line = done, time.monotonic(), time.monotonic()
        self._bar: Progress | None = None

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
        return self

    def advance(self, amount: float, note: str = "") -> None:
        """Report `amount` more work done."""
        storage.check_guard()  # a run that has lost its folder ends here, not only at its next write
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            left = (self._last_line - self._start) * (self.total - self.done) / max(self.done - self._at_start, 1e-9)
            say(f"{self.name:<8} {min(1.0, self.done / self.total):4.0%}, {left:.0f} s left{', ' if note else ''}{note}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            say(f"{self.name:<8} done in {time.monotonic() - self._start:.1f} s")
