"""What tests read in a page of the documentation."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


class Table(NamedTuple):
    """A table of a page."""

    header: list[str]
    rows: list[list[str]]


def read(page: str) -> str:
    """The text of a page, by its path in the repository."""
    return (ROOT / page).read_text()


def prose(page: str) -> str:
    """The text without its code blocks."""
    return FENCE.sub("", read(page))


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def table(page: str, *header: str) -> Table:
    """The only table of a page whose header begins with these cells."""
    found = [table for table in tables(page) if tuple(table.header[: len(header)]) == header]
    assert len(found) == 1, f"{page} has {len(found)} tables with the header {header}"
    return found[0]


def tables(page: str) -> list[Table]:
    """Every table of a page."""
    found, lines = list[list[str]](), prose(page).splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            if not above.startswith("|"):
                found.append([])
            found[-1].append(line)
    return [Table(_cells(head), [_cells(row) for row in rows]) for head, _, *rows in found]


def quoted(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
