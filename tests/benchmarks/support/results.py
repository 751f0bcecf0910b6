"""What the benchmarks of filters found, and the tables of docs/results.md made of it.

python -m tests.benchmarks.support.results docs/results.md
"""

import datetime
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.support.drawings import CACHE

Record = dict[str, Any]
PACKAGES = ("torch", "open_clip_torch", "ray")


def record(table: str, key: str, **found: Any) -> None:
    """Keep what one benchmark found, in place of what it found before."""
    path = CACHE / "results" / table / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    path.write_text(json.dumps(found | {"date": str(datetime.date.today()), "versions": versions}, indent=1))


def recorded(table: str) -> list[Record]:
    """Everything that is known of a table."""
    return [json.loads(path.read_text()) for path in sorted((CACHE / "results" / table).glob("*.json"))]


def filters(records: list[Record]) -> Iterable[list[str]]:
    """Test losses of heads, means over the seeds: a line for each corpus and each of its test sets."""
    yield [
        "corpus",
        "seeds",
        "no filter",
        "cosine, best budget",
        "misalignment",
        "**chosen**",
        "oracle",
        "chosen keeps",
        "worst",
    ]
    for name, seeds in _grouped(records, "corpus"):
        for test, title in enumerate((name, "... names that the target lacks")):
            of = [found for found in seeds if len(found["losses"]["no filter"]) > test]
            if not of:
                continue
            loss = {rule: [found["losses"][rule][test] for found in of] for rule in of[0]["losses"]}
            cosine = [min(found["losses"][rule][test] for rule in loss if rule.startswith("cosine")) for found in of]
            rivals = [loss["no filter"]] if test else [loss["no filter"], cosine, loss["misalignment, own share"]]
            worst = max(own - min(other) for own, *other in zip(loss["chosen filter"], *rivals, strict=True))
            shown = [loss["no filter"], cosine, loss["misalignment, own share"], loss["chosen filter"], loss.get("oracle")]
            keeps = f"{_mean([found['keeps'] for found in of]):.1%}"
            yield [title, str(len(of)), *(f"{_mean(v):.3f}" if v else "" for v in shown), keeps, f"{worst:+.3f}"]


def shares(records: list[Record]) -> Iterable[list[str]]:
    """The share that a run expects, beside the truth: a line for each corpus."""
    yield ["corpus", "truly misaligned", "expected", "interval", "truth is inside", "AUROC of `misalignment`"]
    for name, seeds in _grouped([found for found in records if "interval" in found], "corpus"):
        known = [found for found in seeds if found["truth"] is not None]
        inside = sum(found["interval"][0] - 5e-4 <= found["truth"] <= found["interval"][1] + 5e-4 for found in known)
        expected = ", ".join("unknown" if found["share"] is None else f"{found['share']:.1%}" for found in seeds)
        low, high = min(found["interval"][0] for found in seeds), max(found["interval"][1] for found in seeds)
        areas = [found["auroc"] for found in seeds if found["auroc"] is not None]
        area = f"{_mean(areas):.3f}" if areas else ""
        truth = f"{_mean([found['truth'] for found in known]):.1%}" if known else "not known"
        yield [name, truth, expected, f"{low:.1%} to {high:.1%}", f"{inside} of {len(known)}" if known else "", area]


def kinds(records: list[Record]) -> Iterable[list[str]]:
    """How well each kind of noise is found, means over the seeds."""
    columns = ("held_out_cosine", "agreement", "lemon", "misalignment")
    yield ["kind", "corpus", "share", "seeds", *(f"`{name}`" for name in columns), "AP", "dropping it gains"]
    for _, seeds in _grouped(records, "name"):
        areas = [f"{_mean([found['auroc'][column] for found in seeds]):.3f}" for column in columns]
        rest = [f"{_mean([found[key] for found in seeds]):{how}}" for key, how in (("precision", ".2f"), ("gain", "+.3f"))]
        share = f"{_mean([found['share'] for found in seeds]):.1%}"
        yield [seeds[0]["kind"], seeds[0]["corpus"], share, str(len(seeds)), *areas, *rest]


def whole(records: list[Record]) -> Iterable[list[str]]:
    """Models that are trained whole on what each rule keeps."""
    yield ["corpus", "rule", "pairs", "wrong", "test loss", "R@1", "R@5", "of oracle's gain"]
    for found in records:
        for row in found["rows"]:
            recalls = [50 * (row[f"image_to_text_r{k}"] + row[f"text_to_image_r{k}"]) for k in (1, 5)]
            gain = f"{row['share_of_oracle_gain']:.0%}"
            loss = f"{row['loss']:.3f} ± {row['loss_std']:.3f}"
            yield [
                found["corpus"],
                row["rule"],
                str(row["kept"]),
                f"{row['wrong']:.1%}",
                loss,
                *(f"{r:.1f}" for r in recalls),
                gain,
            ]


TABLES: dict[str, tuple[str, Callable[[list[Record]], Iterable[list[str]]]]] = {  # in the docs: whose records, and how shown
    "filters": ("filters", filters),
    "shares": ("filters", shares),
    "shares of mixtures": ("mixtures", shares),
    "kinds": ("kinds", kinds),
    "whole models": ("whole", whole),
}


def written(text: str) -> str:
    """A text with its tables made anew, each between two comments that name it."""
    for name, (table, show) in TABLES.items():
        records = recorded(table)
        if records:
            dates = sorted({found["date"] for found in records})
            told = f"Measured on {' and '.join(dates)} with {records[-1]['versions']}."
            lines = [f"| {' | '.join(row)} |" for row in show(records)]
            lines.insert(1, "|---" * (lines[0].count("|") - 1) + "|")
            body = "\n".join(["", *lines, "", told, ""])
            between = re.compile(f"(<!-- table of {name} -->).*?(<!-- end -->)", re.DOTALL)
            text = between.sub(lambda found, body=body: f"{found[1]}{body}{found[2]}", text)
    return text


def _grouped(records: list[Record], key: str) -> list[tuple[str, list[Record]]]:
    found = defaultdict(list)
    for one in records:
        found[one[key]].append(one)
    return list(found.items())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    docs = Path(sys.argv[1])
    docs.write_text(written(docs.read_text()))
