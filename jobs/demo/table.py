"""The table of the demo's results: on the terminal, and between its markers in the README.

    python -m jobs.demo.table runs/demo/run/summary.json README.md

`make demo-readme` runs the demo and then this.
"""

import json
import sys
from pathlib import Path
from typing import Any

BEGIN = "<!-- demo table: written by make demo-readme -->"
END = "<!-- end of demo table -->"
HEADINGS = ["rule", "AUROC", "precision", "test loss", "R@1", "R@5", "target loss", "of oracle's gain"]


def cells(summary: dict[str, Any]) -> list[list[str]]:
    """One row for each rule of a `summary.json`, with a cell for each of `HEADINGS`.

    A rule that ranks by no column has no AUROC and no precision.
    """
    rows = []
    for row in summary["rules"]:
        found = summary["scores"].get(row["column"])
        rows.append(
            [
                row["rule"],
                *(f"{found[key]:.3f}" if found else "" for key in ("auroc", "precision")),
                f"{row['test_loss']:.3f} ± {row['test_loss_std']:.3f}",
                *(f"{100 * row[key]:.1f}" for key in ("test_r1", "test_r5")),
                f"{row['target_loss']:.3f}",
                f"{row['share_of_oracle_gain']:.0%}",
            ]
        )
    return rows


def markdown(summary: dict[str, Any]) -> str:
    """The table in Markdown, below a sentence that says how many pairs each rule drops."""
    swapped, pairs = summary["swapped"], summary["pairs"]
    dropped = pairs - summary["rules"][-1]["kept"]  # the last rule is the chosen filter
    says = (
        f"{swapped} of {pairs} captions are swapped. The first rule drops none, the others {swapped}; "
        f"the chosen filter dropped {dropped} by its own choice."
    )
    lines = [HEADINGS, ["---"] + ["---:"] * (len(HEADINGS) - 1), *cells(summary)]
    return "\n".join([says, "", *("| " + " | ".join(line) + " |" for line in lines)])


def replaced(text: str, table: str) -> str:
    """A text with another table between its markers.

    Raises:
        ValueError: the text has not both markers, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no place for the table: the text needs {BEGIN} and then {END}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main(summary: str, readme: str) -> None:
    """Write the table of a `summary.json` into a README."""
    path = Path(readme)
    path.write_text(replaced(path.read_text(), markdown(json.loads(Path(summary).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
