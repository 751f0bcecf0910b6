"""The README's table of results is the one that the demo writes, in its format of today."""

import re

import pytest

from jobs.demo.table import BEGIN, END, HEADINGS, markdown, replaced
from pipeline.config import Config
from pipeline.results.judge import BASELINES, CHOSEN, rankings
from tests.support.markdown import ROOT

README = (ROOT / "README.md").read_text()
TABLE = README.partition(BEGIN)[2].partition(END)[0].strip()
SHAPES = [r"0\.\d{3}", r"0\.\d{3}", r"\d\.\d{3} ± 0\.\d{3}", r"\d\d\.\d", r"\d\d\.\d", r"\d\.\d{3}", r"-?\d+%"]

# A configuration as the demo's: one target, every default.
DEMO = Config(run="run", corpus={"shards": "corpus"}, model={"name": "x"}, targets={"fluent": {"shards": "target"}})


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]


def summary() -> dict:
    measures = {"test_loss": 3.5, "test_loss_std": 0.01, "test_r1": 0.2, "test_r5": 0.5, "target_loss": 3.9}
    ranked = {**dict.fromkeys(BASELINES, ""), **rankings(DEMO), CHOSEN: "filter_fluent"}
    rules = [
        {"rule": rule, "column": column, "kept": 80, "share_of_oracle_gain": -0.05} | measures
        for rule, column in ranked.items()
    ]
    scores = {column: {"auroc": 0.9, "precision": 0.8} for column in ranked.values() if column}
    return {"rules": rules, "scores": scores, "swapped": 15, "pairs": 100}


def test_the_readme_has_a_complete_row_for_every_rule_that_the_demo_judges():
    written = rows(markdown(summary()))
    head, line, *body = rows(TABLE)
    assert (head, line) == (HEADINGS, written[1])
    assert [row[0] for row in body] == [row[0] for row in written[2:]] == [*BASELINES, *rankings(DEMO), CHOSEN]
    for name, *cells in body:
        for cell, shape in zip(
            cells[2:] if name in BASELINES else cells, SHAPES[2:] if name in BASELINES else SHAPES, strict=True
        ):
            assert re.fullmatch(shape, cell), (name, cell)
    assert all(row[1:3] == ["", ""] for row in body[: len(BASELINES)])


def test_a_number_stands_under_its_heading():
    row = rows(markdown(summary()))[-1]
    expected = ["chosen filter", "0.900", "0.800", "3.500 ± 0.010", "20.0", "50.0", "3.900", "-5%"]
    assert row == expected
    assert markdown(summary()).startswith("15 of 100 captions are swapped. The first rule drops none, the others 15; ")
    assert "dropped 20 by" in markdown(summary()).splitlines()[0]


def test_only_what_is_between_the_markers_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter {END}\n"
    assert replaced(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter {END}\n"
    assert replaced(replaced(text, "new"), "new") == replaced(text, "new")
    for broken in (text.replace(BEGIN, ""), text.replace(END, "")):
        with pytest.raises(ValueError, match="the text needs"):
            replaced(broken, "new")
