"""Text for people: lines through `logging`, and aligned tables.

A caller from Python can silence, redirect or show the logger `ecif` like any other. The command line shows it on stderr.
"""

import logging
import sys
import time

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)
log = logging.getLogger("ecif")


class _Terminal(logging.Handler):
    """Plain lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        timed = getattr(record, "timed", False) and not console.is_terminal
        when = time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(record.created)) if timed else ""
        console.print(when + self.format(record), markup=False)
        sys.stderr.flush()


def show_on_terminal() -> None:
    """Show lines on standard error from now on, with progress bars if that is a terminal."""
    if not any(isinstance(handler, _Terminal) for handler in log.handlers):
        log.addHandler(_Terminal())
        log.setLevel(logging.INFO)
        log.propagate = False


def has_bars() -> bool:
    """Whether progress is shown as a bar."""
    return console.is_terminal and any(isinstance(handler, _Terminal) for handler in log.handlers)


def say(line: str, level: int = logging.INFO) -> None:
    """Log one line for the user."""
    log.log(level, "%s", line)


def say_at(line: str) -> None:
    """Log one line about how far a run is. It is shown with the time where there is no terminal: a log is read afterwards."""
    log.info("%s", line, extra={"timed": True})


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as lines. The first column is aligned left; the others, mostly numbers, right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in cells)
