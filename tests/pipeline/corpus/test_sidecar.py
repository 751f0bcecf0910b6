"""What img2dataset left beside a shard is joined by key, whatever its order; nothing that is missing passes unsaid."""

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
        ({"key": ["0"]}, "not what the first sidecar is"),
        ({"key": ["0"], "similarity": ["high"]}, "not what the first sidecar is"),
        (b"no parquet", "not what the first sidecar is"),
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
