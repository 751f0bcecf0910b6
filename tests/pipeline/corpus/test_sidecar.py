"""What img2dataset left beside a shard is joined by key, whatever its order; nothing that is missing passes unsaid."""

import uuid

import pyarrow as pa
import pytest

from pipeline.corpus import shards, sidecar
from pipeline.errors import RunError, UserError
from pipeline.run_folder.tables import parquet_bytes
from tests.support.tars import pair, write_tar

TABLE = {
    "key": ["2", "failed", "0", "1", "0"],
    "similarity": [0.2, None, 0.0, 0.1, 9.0],
    "status": ["ok", "failed", "ok", "ok", "x"],
}


@pytest.fixture
def corpus(tmp_path):
    """Writes shards of three pairs; by shard, the columns of its sidecar or None. Gives the shards."""

    def write(**tables):
        for name, table in tables.items():
            write_tar(tmp_path / f"{name}.tar", [m for i in range(3) for m in pair(str(i))])
            if table is not None:
                data = table if isinstance(table, bytes) else parquet_bytes(pa.table(table))
                (tmp_path / f"{name}.parquet").write_bytes(data)
        return shards.find(str(tmp_path))

    return write


def carried(found: sidecar.Sidecars, shard: str, keys: list[str]) -> dict[str, list]:
    return {name: column.to_pylist() for name, column in sidecar.columns(found, shard, keys).items()}


def test_columns_are_joined_by_key(corpus):
    found = sidecar.find(corpus(a=TABLE), ["similarity", "status"], False)
    assert carried(found, "a", ["0", "1", "2"]) == {"sidecar_similarity": [0.0, 0.1, 0.2], "sidecar_status": ["ok"] * 3}
    assert carried(found, "a", ["2", "gone"]) == {"sidecar_similarity": [0.2, None], "sidecar_status": ["ok", None]}
    assert carried(found, "a", []) == {"sidecar_similarity": [], "sidecar_status": []}


def test_a_shard_without_a_sidecar_has_nulls_of_the_same_type_and_is_named(corpus, capsys):
    found = sidecar.find(corpus(a=TABLE, b=None), ["similarity", "status"], False)
    with_, without = (sidecar.columns(found, shard, ["0", "1"]) for shard in ("a", "b"))
    assert carried(found, "b", ["0", "1"]) == {"sidecar_similarity": [None, None], "sidecar_status": [None, None]}
    assert {name: column.type for name, column in with_.items()} == {name: column.type for name, column in without.items()}
    assert "1 of 2 shards have no .parquet beside them, such as b" in capsys.readouterr().err


def test_nothing_is_read_where_nothing_is_asked(corpus):
    assert sidecar.find(corpus(a=b"no parquet"), [], False) is None


@pytest.mark.parametrize(
    ("tables", "columns", "uids", "said"),
    [
        ({"a": None}, ["similarity"], False, "1 of 1 shards have no .parquet"),
        ({"a": {"key": ["0"], "uid": ["x"]}, "b": None}, [], True, "1 of 2 shards have no .parquet beside them, such as b"),
        ({"a": TABLE}, ["beauty"], False, "no column 'beauty' in .*a.parquet: there are key, similarity, status"),
        ({"a": TABLE}, [], True, "no column 'uid'"),
        ({"a": {"similarity": [1.0]}}, ["similarity"], False, "no column 'key'"),
        ({"a": b"no parquet"}, ["similarity"], False, "a.parquet is no Parquet file"),
    ],
)
def test_what_is_not_there_is_an_error_before_anything_starts(corpus, tables, columns, uids, said):
    with pytest.raises(UserError, match=said):
        sidecar.find(corpus(**tables), columns, uids)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"key": ["0"]}, "not what the other sidecars are"),
        ({"key": ["0"], "similarity": ["high"]}, "not what the other sidecars are"),
        (b"no parquet", "not what the other sidecars are"),
        ({"key": ["000", "001"], "similarity": [0.0, 1.0]}, "none of its keys is in the shard, such as '000' and '0'"),
    ],
)
def test_a_sidecar_unlike_the_first_ends_the_run(corpus, other, said):
    found = sidecar.find(corpus(a=TABLE, b=other), ["similarity"], False)
    with pytest.raises(RunError, match=said):
        sidecar.columns(found, "b", ["0", "1"])


def test_numbers_as_keys_are_text(corpus):
    found = sidecar.find(corpus(a={"key": [1, 0], "n": [10, 20]}), ["n", "n"], False)
    assert carried(found, "a", ["0", "1"]) == {"sidecar_n": [20, 10]}


def twice(**columns) -> bytes:
    """A sidecar with some columns twice: a list of pairs has names that a dictionary can't."""
    names = [name for name in columns for _ in range(2)]
    return parquet_bytes(pa.Table.from_arrays([pa.array(columns[name]) for name in names], names))


ONE = {"key": ["0"], "similarity": [0.5]}


@pytest.mark.parametrize(
    ("tables", "columns", "uids", "said"),
    [
        ({"a": twice(key=["0"], similarity=[1.0])}, ["similarity"], False, "a.parquet has two columns 'key'"),
        ({"a": ONE, "b": twice(key=["0"], similarity=[1.0])}, ["similarity"], False, "b.parquet has two columns 'key'"),
        ({"a": ONE | {"uid": [["x"]]}}, [], True, "column 'uid' of .*a.parquet holds list"),
        ({"a": {"key": [{"k": 1}], "similarity": [1.0]}}, ["similarity"], False, "column 'key' of .*a.parquet holds struct"),
        ({"a": TABLE, "b": {"key": ["0"]}}, ["similarity"], False, "no column 'similarity' in .*b.parquet: there are key"),
        (
            {"a": ONE, "b": {"key": ["0"], "similarity": ["high"]}},
            ["similarity"],
            False,
            "'similarity' holds double in .*a.parquet and string in .*b.parquet: write it in one type",
        ),
        ({"a": TABLE, "b": b""}, ["similarity"], False, "b.parquet is no Parquet file: it is empty"),
        ({"a": TABLE}, ["similarity", "Similarity"], False, "'similarity' and 'Similarity' differ in case only"),
    ],
)
def test_a_sidecar_that_can_not_be_joined_is_said_before_anything_starts(corpus, tables, columns, uids, said):
    with pytest.raises(UserError, match=said):
        sidecar.find(corpus(**tables), columns, uids, sidecar.LOOKED_AT)


def test_columns_that_nobody_asked_for_do_not_matter(corpus):
    table = pa.Table.from_arrays([pa.array([x]) for x in ("0", 0.5, 1, 2)], ["key", "similarity", "more", "more"])
    found = sidecar.find(corpus(a=parquet_bytes(table)), ["similarity"], False)
    assert carried(found, "a", ["0"]) == {"sidecar_similarity": [0.5]}


def test_a_column_has_a_type_that_holds_the_values_of_every_sidecar(corpus):
    tables = {"a": {"key": ["0"], "n": [1], "t": [None]}, "b": {"key": ["0"], "n": [0.5], "t": ["x"]}}
    found = sidecar.find(corpus(**tables), ["n", "t"], False, sidecar.LOOKED_AT)
    assert found.schema.types == [pa.float64(), pa.string()]
    assert carried(found, "a", ["0"]) == {"sidecar_n": [1.0], "sidecar_t": [None]}
    assert carried(found, "b", ["0", "1"]) == {"sidecar_n": [0.5, None], "sidecar_t": ["x", None]}


def test_some_sidecars_are_looked_at_all_over_the_corpus(corpus):
    found = corpus(**{f"s{i}": ONE for i in range(6)} | {"s3": {"key": ["0"]}})
    sidecar.find(found, ["similarity"], False, 1)
    with pytest.raises(UserError, match=r"s3\.parquet"):
        sidecar.find(found, ["similarity"], False, 2)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1.0, 2.0], None]),
        pa.array([{"a": 1}, {"a": None}]),
        pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32())),
        pa.array(["x", "y"]).dictionary_encode(),
        pa.array([b"x", None]),
        pa.array([None, None]),
        pa.array([1, 2], pa.timestamp("us", "UTC")),
    ],
    ids=lambda column: str(column.type),
)
def test_a_column_of_any_type_is_carried(corpus, column):
    found = sidecar.find(corpus(a={"key": ["0", "1"], "misalignment": column}, b=None), ["misalignment"], False)
    values = column.to_pylist()
    assert carried(found, "a", ["1", "0", "2"]) == {"sidecar_misalignment": [values[1], values[0], None]}
    assert carried(found, "b", ["1"]) == {"sidecar_misalignment": [None]}


def test_the_key_itself_can_be_carried(corpus):
    found = sidecar.find(corpus(a={"key": [1, 0]}), ["key"], False)
    assert carried(found, "a", ["0", "1", "2"]) == {"sidecar_key": [0, 1, None]}


def test_a_sidecar_without_rows_has_nulls(corpus):
    empty = pa.table({"key": pa.array([], pa.string()), "similarity": pa.array([], pa.float64())})
    found = sidecar.find(corpus(a=ONE, b=parquet_bytes(empty)), ["similarity"], False, sidecar.LOOKED_AT)
    assert carried(found, "b", ["0", "1"]) == {"sidecar_similarity": [None, None]}


UUID = uuid.UUID("0123456789abcdef0123456789abcdef")


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([str(UUID), None]), str(UUID)),
        (pa.array([UUID.int >> 70, None]), str(UUID.int >> 70)),
        (pa.array([UUID.bytes, None], pa.binary(16)), UUID.hex),
        (pa.array([UUID.bytes, None], pa.uuid()), UUID.hex),
        (pa.array([UUID.hex, None]).dictionary_encode(), UUID.hex),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_uids_of_any_type_are_text(column, text):
    table = parquet_bytes(pa.table({"key": ["0", "1"], "uid": column}))
    assert sidecar.read_uids(table, "a.parquet") == {"0": text, "1": None}
