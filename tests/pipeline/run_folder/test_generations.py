"""Generations: any name of a shard, what a commit replaces, and what a Delta table can hold."""

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder.generations import File, Generations, file_path, unknown_types

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda name: name.strip(". ") == name
)


def write(generations: Generations, run: str, shard: str, source: int, rows: int = 3, column: str = "x") -> File:
    data = tables.parquet_bytes(pa.table({"uid": [shard] * rows, column: np.full(rows, source, np.float32)}))
    path = file_path(run * 16, shard, f"{source:016x}")
    storage.write_bytes(storage.join(generations.root, path), data)
    return File(path, len(data), rows)


@settings(max_examples=25, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=4, unique_by=str.casefold), st.sampled_from(["", "part.1/", "a b/%20/"]))
def test_any_name_of_a_shard_is_found_again(tmp_path_factory, names, folder):
    generations = Generations(str(tmp_path_factory.mktemp("run")))
    files = {folder + name: write(generations, "a", folder + name, 7) for name in names}
    assert generations.commit(files, {"n": 0}, None) == 0
    last = generations.last()
    assert last.files == files
    assert {file.shard for file in files.values()} == files.keys()
    assert {(file.run, file.source) for file in files.values()} == {("a" * 16, f"{7:016x}")}
    assert DeltaTable(generations.root).to_pyarrow_table().num_rows == 3 * len(names)


def test_a_commit_replaces_what_differs_and_another_reference_everything(tmp_path):
    generations = Generations(str(tmp_path))
    first = {shard: write(generations, "a", shard, 1) for shard in "xyz"}
    generations.commit(first, {"n": 0}, None)
    second = {"x": first["x"], "y": write(generations, "a", "y", 2, rows=5)}
    assert generations.commit(second, {"n": 1}, generations.last()) == 1
    anew = {shard: write(generations, "b", shard, 1, column="another") for shard in "xy"}
    assert generations.commit(anew, {"n": 2}, generations.last()) == 2
    assert generations.commit(first, {"n": 3}, generations.last()) == 3
    assert [generations.at(number).files for number in range(4)] == [first, second, anew, first]
    assert [(one.number, one.record) for one in generations.history()] == [(n, {"n": n}) for n in (3, 2, 1, 0)]
    columns = [DeltaTable(generations.root, version=n).to_pyarrow_table().column_names for n in range(4)]
    assert columns == [["uid", "x"], ["uid", "x"], ["uid", "another"], ["uid", "x"]]


def test_of_two_commits_after_one_generation_one_is_refused(tmp_path):
    generations = Generations(str(tmp_path))
    generations.commit({"x": write(generations, "a", "x", 1)}, {}, None)
    before = generations.last()
    generations.commit({"x": write(generations, "a", "x", 2)}, {}, before)
    with pytest.raises(RunError, match="another generation was committed meanwhile"):
        generations.commit({"x": write(generations, "a", "x", 3)}, {}, before)


@pytest.mark.parametrize(
    "kind", [pa.uint8(), pa.null(), pa.timestamp("ns"), pa.float16(), pa.time64("us"), pa.duration("s"), pa.decimal256(40, 2)]
)
def test_what_a_delta_table_does_not_know_is_said(kind):
    known = [pa.bool_(), pa.int8(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.date32()]
    schema = pa.schema([(f"c{i}", one) for i, one in enumerate([*known, pa.timestamp("us"), pa.timestamp("us", "UTC"), kind])])
    assert unknown_types(schema) == [f"c10 ({kind})"]
