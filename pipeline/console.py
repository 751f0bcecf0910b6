"""What a person reads: plain lines on standard error, aligned tables."""

import sys

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One plain line on standard error."""
    console.print(line, markup=False)
    sys.stderr.flush()


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as lines, the first column to the left and the others, mostly numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in cells)
