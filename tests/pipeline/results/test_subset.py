"""A subset of either format names pairs of a run, each as often as it is to be trained on."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import UserError
from pipeline.results import subset as subsets
from pipeline.results.subset import SUBSET, Keys, read_subset
from pipeline.run_folder.tables import parquet_bytes
from tests.support.subsets import write_uids
from tests.support.tars import npy

UIDS = [f"{i:032x}" for i in range(10)]
SHARDS = {  # two shards with the same keys; one uid is in both, one twice in the second
    "a": pa.table({"index": pa.array([0, 2, 3], pa.int32()), "key": ["x", "y", "z"], "uid": UIDS[:3]}),
    "b": pa.table({"index": pa.array([0, 1, 2], pa.int32()), "key": ["x", "y", "z"], "uid": [UIDS[0], UIDS[5], UIDS[5]]}),
}


def keys(tmp_path, **columns) -> str:
    storage.write_bytes(str(tmp_path / "keys.parquet"), parquet_bytes(pa.table(columns)))
    return str(tmp_path / "keys.parquet")


def copies(url: str) -> tuple[dict[str, list[int]], tuple[int, str], tuple[int, str]]:
    subset = read_subset(url)
    found = {shard: subset.copies(shard, pairs).tolist() for shard, pairs in SHARDS.items()}
    return found, subset.missing(), subset.ambiguous()


@pytest.mark.parametrize("uids", [[UIDS[3], UIDS[1], UIDS[3], UIDS[3]], [], ["f" * 32], ["0" * 32, "0" * 31 + "1"]])
def test_a_uid_is_as_often_in_a_subset_as_it_was_written(tmp_path, uids):
    write_uids(str(tmp_path / "s.npy"), uids)
    subset = read_subset(str(tmp_path / "s.npy"))
    assert len(subset) == len(uids)
    if uids:
        pairs = pa.table({"index": range(10), "key": UIDS, "uid": UIDS})
        assert subset.copies("a", pairs).tolist() == [uids.count(uid) for uid in UIDS]


def test_a_uid_stands_for_every_pair_that_has_it(tmp_path):
    write_uids(str(tmp_path / "s.npy"), [UIDS[0], UIDS[2], UIDS[2], UIDS[5]])
    assert copies(str(tmp_path / "s.npy")) == ({"a": [1, 0, 2], "b": [1, 1, 1]}, (0, ""), (2, UIDS[0]))
    write_uids(str(tmp_path / "s.npy"), [UIDS[1], UIDS[7], UIDS[8]])
    assert copies(str(tmp_path / "s.npy")) == ({"a": [0, 1, 0], "b": [0, 0, 0]}, (2, UIDS[7]), (0, ""))


HALF = st.sampled_from(["0" * 16, "f" * 16, "0" * 15 + "1", "8" + "0" * 15, "7" + "f" * 15])
UID = st.tuples(HALF, HALF).map("".join)


@given(
    entries=st.lists(UID, max_size=20), pairs=st.lists(st.lists(UID, max_size=6), max_size=3), chunk=st.sampled_from([1, 3, 99])
)
@settings(deadline=None, max_examples=150)
def test_uids_are_counted_as_in_a_list(tmp_path_factory, entries, pairs, chunk):
    """Uids that differ in either half alone, in shards of any size."""
    before, subsets.CHUNK = subsets.CHUNK, chunk
    try:
        subset = read_subset(write_uids(str(tmp_path_factory.mktemp("subset") / "s.npy"), entries))
        for shard in pairs:
            table = pa.table({"uid": pa.array(shard, pa.string())})
            assert subset.copies("", table).tolist() == [entries.count(uid) for uid in shard]
        flat = [uid for shard in pairs for uid in shard]
        missing = sorted(set(entries) - set(flat))
        several = sorted(uid for uid in set(entries) if flat.count(uid) > 1)
        assert subset.missing() == (len(missing), (missing or [""])[0])
        assert subset.ambiguous() == (len(several), (several or [""])[0])
    finally:
        subsets.CHUNK = before


@pytest.mark.parametrize("chunk", [1, 2, 1000])
@pytest.mark.parametrize(
    ("entries", "at"), [([(1, 2), (3, 1), (2, 9)], 2), ([(0, 1), (0, 0), (1, 0)], 1), ([(2**63, 0), (1, 0)], 1)]
)
def test_a_subset_that_is_not_sorted_is_refused(tmp_path, monkeypatch, entries, at, chunk):
    monkeypatch.setattr(subsets, "CHUNK", chunk)
    np.save(tmp_path / "s.npy", np.array(entries, SUBSET))
    with pytest.raises(UserError, match=f"s.npy is not sorted: entry {at} is below the one before it"):
        read_subset(str(tmp_path / "s.npy"))


def test_the_uids_of_a_subset_stay_in_its_file(tmp_path):
    path = write_uids(str(tmp_path / "s.npy"), UIDS)
    halves = read_subset(path).halves
    assert isinstance(halves.base if halves.base is not None else halves, np.memmap)
    assert str(halves.filename) == path


def test_a_subset_on_a_store_is_searched_in_a_copy_of_it():
    subset = read_subset(write_uids("memory://subsets/s.npy", [UIDS[0], UIDS[1]]))
    assert subset.copies("a", SHARDS["a"]).tolist() == [1, 1, 0]


@pytest.mark.parametrize("by", ["key", "index", "both"])
def test_shard_and_key_name_one_pair(tmp_path, by):
    columns = {"shard": ["b", "a", "b", "b"], "key": ["z", "x", "y", "z"], "index": [2, 0, 1, 2], "more": [1, 2, 3, 4]}
    left_out = {"key": ["index"], "index": ["key"], "both": []}[by]
    url = keys(tmp_path, **{name: values for name, values in columns.items() if name not in left_out})
    assert copies(url) == ({"a": [1, 0, 0], "b": [0, 1, 2]}, (0, ""), (0, ""))


def test_pairs_that_the_run_has_not_are_counted(tmp_path):
    url = keys(tmp_path, shard=["a", "a", "c", "c"], key=["x", "q", "x", "y"])
    assert copies(url) == ({"a": [1, 0, 0], "b": [0, 0, 0]}, (3, "q of a"), (0, ""))


def test_keys_of_nothing(tmp_path):
    url = keys(tmp_path, shard=pa.array([], pa.string()), key=pa.array([], pa.string()))
    assert len(read_subset(url)) == 0
    assert copies(url) == ({"a": [0, 0, 0], "b": [0, 0, 0]}, (0, ""), (0, ""))


def test_keys_in_many_row_groups(tmp_path):
    rows = pa.table({"shard": ["a", "b"] * 3, "key": ["x", "x", "y", "y", "z", "z"]})
    pq.write_table(rows, tmp_path / "keys.parquet", row_group_size=1)
    assert copies(str(tmp_path / "keys.parquet"))[0] == {"a": [1, 1, 1], "b": [1, 1, 1]}
    chunks = Keys("keys", pa.concat_tables([rows.slice(0, 3), rows.slice(3)]))
    assert chunks.copies("b", SHARDS["b"]).tolist() == [1, 1, 1]


def test_text_of_any_kind_is_a_key(tmp_path):
    url = keys(tmp_path, shard=pa.array(["b", "a"]).dictionary_encode(), key=pa.array(["x", "z"], pa.large_string()))
    assert copies(url)[0] == {"a": [0, 0, 1], "b": [1, 0, 0]}


def test_keys_of_another_corpus_are_refused(tmp_path):
    with pytest.raises(UserError, match="has other keys at the indices of a than the run"):
        copies(keys(tmp_path, shard=["a"], key=["x"], index=[2]))


def test_a_key_of_several_pairs_needs_the_index(tmp_path):
    pairs = SHARDS["a"].set_column(1, "key", pa.array(["x", "x", "y"]))
    with pytest.raises(UserError, match="several pairs of a have one key: the column index is needed"):
        read_subset(keys(tmp_path, shard=["a"], key=["x"])).copies("a", pairs)
    assert read_subset(keys(tmp_path, shard=["a"], key=["x"], index=[2])).copies("a", pairs).tolist() == [0, 1, 0]


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(3, SUBSET))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is no .npy file"),
        (b"uid\n0\n", "is no .npy file"),
        (npz(), "is no .npy file"),
        (npy(np.zeros(9, SUBSET))[:-1], "is no .npy file"),
        (npy(np.array([None])), "is no .npy file"),
        (npy(np.zeros(3)), "holds float64"),
        (npy(np.zeros(3, "u8")), "holds uint64"),
        (npy(np.zeros(3, "<i8,<i8")), "a DataComp subset holds"),
        (b"PAR1 and nothing more", "is no Parquet file"),
        (parquet_bytes(pa.table({"uid": UIDS})), "has columns uid: shard and key are needed"),
        (parquet_bytes(pa.table({"shard": ["a"]})), "shard and key are needed"),
        (parquet_bytes(pa.table({"shard": ["a"], "key": [["x"]]})), "shard and key are text"),
        (parquet_bytes(pa.table({"shard": ["a", None], "key": ["x", "y"]})), "has rows without shard, key or index"),
    ],
)
def test_another_file_is_no_subset(tmp_path, data, says):
    storage.write_bytes(str(tmp_path / "s.npy"), data)
    with pytest.raises(UserError, match=says):
        read_subset(str(tmp_path / "s.npy"))


def test_a_subset_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no subset"):
        read_subset(str(tmp_path / "s.npy"))
