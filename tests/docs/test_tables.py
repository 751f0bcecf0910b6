"""Tables in the documentation that list what the code has are held equal to the code, both ways."""

from typing import Any, ClassVar, get_type_hints

import pyarrow as pa
import pytest

from ecif.columns import Column, PairScore
from ecif.losses import Loss
from ecif.registry import Kind
from ecif.targets import TargetLoss
from pipeline.config import Config
from pipeline.corpus.captions import PRESETS
from pipeline.corpus.reasons import REASONS
from pipeline.operate import plan, status
from pipeline.operate.bill import bill
from pipeline.operate.costs import Cost, Machine
from pipeline.results.export import Writer
from pipeline.run_folder import tables
from pipeline.run_folder.artifacts import KINDS
from pipeline.run_folder.columns import EVERY_RUN, IDENTITY, columns
from pipeline.sections import Prices
from tests.support.markdown import quoted, table

# Properties of the configuration, and the keys that a user sets them by.
KEYS = {"repeats": "score.repeats", "solve.calibration_refits": "solve.refits"}
BASELINES = [name for name, score in PairScore.kinds.items() if score.__module__.startswith("ecif.") and name not in EVERY_RUN]


def everything() -> Config:
    """A run that was asked for every column, of a target whose name stands for any."""
    score = {"order": 2, "columns": BASELINES}
    target = {"TARGET": {"shards": "x"}}
    return Config.model_validate(
        {"run": "run", "corpus": {"shards": "x"}, "model": {"name": "x"}, "targets": target, "score": score}
    )


def own(kinds: dict[str, Any]) -> dict[str, Any]:
    """The kinds that the package brings: other tests register their own."""
    return {name: kind for name, kind in kinds.items() if kind.__module__.startswith(("ecif.", "pipeline."))}


def code(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def test_kinds_of_objects():
    def row(kind: str) -> list[str]:
        what = KINDS[kind]
        keys = code(KEYS.get(key, key) for key in what.reads)
        made_of = code(what.made_of) or "the model, and how pairs are read"
        return [f"`{kind}`", f"`{what.stage}`", ", ".join(what.each) or "run", made_of, keys, what.says]

    found = table("docs/columns.md", "kind", "stage", "one for each", "made of", "keys", "what it holds")
    assert found.rows == [row(kind) for kind in KINDS]


def test_contents_that_kinds_are_made_of():
    found = table("docs/columns.md", "content", "fingerprint of")
    assert {name for row in found.rows for name in quoted(row[0])} == {
        name for kind in KINDS.values() for name in kind.made_of if name not in KINDS
    }


def test_columns_of_a_run():
    identities = [[f"`{name}`", "", "", says] for name, says in IDENTITY.items()]
    scores = [[f"`{c.name.replace('TARGET', '<target>')}`", c.good, c.unit, c.says] for c in columns(everything())]
    assert table("docs/columns.md", "column", "good", "unit", "what it says").rows == identities + scores


def test_metadata_of_the_schema():
    column = Column("score", "low", "nats", "A score.")
    schema = tables.described(tables.scores_table({"score": pa.array([1.0])}, {}), [column], "run", "shard").schema
    facts = [name.decode() for name in [*schema.field("score").metadata, *schema.metadata]]
    assert [quoted(row[0]) for row in table("docs/columns.md", "key of the metadata").rows] == [[name] for name in facts]


@pytest.mark.parametrize("page", ["docs/columns.md", "docs/operations.md"])
def test_reasons(page):
    assert [name for row in table(page, "reason").rows for name in quoted(row[0])] == list(REASONS)


def test_presets():
    places = {name: [".txt" if p == "txt" else p for p in found] for name, found in PRESETS.items()}
    found = table("docs/operations.md", "preset", "places, in order")
    assert {quoted(row[0])[0]: quoted(row[1]) for row in found.rows} == places


def capabilities(contract: type[Kind]) -> dict[str, set[str]]:
    """Which kinds say that they can do what, by the attribute that says so."""
    asked = [name for name, hint in get_type_hints(contract).items() if hint == ClassVar[bool]]
    return {name: {kind for kind, what in own(contract.kinds).items() if getattr(what, name)} for name in asked}


@pytest.mark.parametrize(("contract", "header"), [(Loss, "attribute of a loss"), (TargetLoss, "attribute of a target")])
def test_capabilities(contract, header):
    found = table("docs/method.md", header, "means", "needed for", "true of")
    assert {quoted(row[0])[0]: set(quoted(row[3])) for row in found.rows} == capabilities(contract)


@pytest.mark.parametrize(
    ("page", "header", "contract"),
    [
        ("docs/method.md", "loss", Loss),
        ("docs/method.md", "`loss` of a target", TargetLoss),
        ("docs/operations.md", "format", Writer),
    ],
)
def test_kinds_that_a_name_stands_for(page, header, contract):
    names = [quoted(row[0])[0] for row in table(page, header).rows]
    assert {name for name in names if ":" not in name} == set(own(contract.kinds))
    assert len(set(names)) == len(names)


def test_baselines():
    assert {quoted(row[0])[0] for row in table("docs/method.md", "baseline").rows} == set(BASELINES)


def test_stages_and_their_columns():
    found = table("docs/operations.md", "stage", "is done when")
    assert [quoted(row[0])[0] for row in found.rows] == list(dict.fromkeys(what.stage for what in KINDS.values()))
    for header, page_header in ((status.HEADER, "column of `ecif status`"), (plan.HEADER, "column of `ecif plan`")):
        assert [quoted(row[0])[0] for row in table("docs/operations.md", page_header).rows] == [name for name in header if name]


def test_columns_of_the_costs():
    prices = Prices(core_hour=1, tb_month=1, thousand_writes=1, thousand_reads=1)
    header, *_ = bill([], Cost("a night"), Machine("cpu", 32, 1), prices)
    assert [quoted(row[0])[0] for row in table("docs/operations.md", "column of the costs").rows] == header


def test_defaults_of_the_budgets():
    for row in table("docs/operations.md", "key", "default").rows:
        section, _, name = quoted(row[0])[0].partition(".")
        assert row[1] == str(Config.model_fields[section].annotation.model_fields[name].default)
