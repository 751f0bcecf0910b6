"""A subset file is what DataComp takes, sorted on disk; a table of keys is exact where uids repeat."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RunError, UserError
from pipeline.results import write as writing
from pipeline.results.select import Selected, of_table, select
from pipeline.results.subset import SUBSET
from pipeline.results.write import write_keys, write_subset
from pipeline.run_folder.finished import open_run
from tests.support.finished import write_scores

UIDS = [f"{i:032x}" for i in range(10)]
TWICE = [UIDS[0], UIDS[1], UIDS[0], UIDS[2], UIDS[1], UIDS[3]]  # the uids of six pairs


def write(path, uids: list[str], copies: list[int] | None = None, unique: bool = False) -> int:
    counts = np.ones(len(uids), bool) if copies is None else np.array(copies, np.int32)
    return write_subset(str(path), of_table(pa.table({"uid": pa.array(uids, pa.string())})), Selected([counts]), unique)


def written(path) -> list[str]:
    return [f"{high:016x}{low:016x}" for high, low in np.load(path, allow_pickle=False).tolist()]


def test_a_subset_is_sorted_pairs_of_64_bits(tmp_path):
    uids = ["f" * 32, "0" * 16 + "f" * 16, "8" + "0" * 31, "0" * 31 + "1", "0" * 15 + "1" + "0" * 16]
    write(tmp_path / "s.npy", uids)
    halves = np.load(tmp_path / "s.npy", allow_pickle=False)
    assert halves.dtype == np.dtype("u8,u8") == SUBSET
    assert halves.tolist() == [(int(uid[:16], 16), int(uid[16:32], 16)) for uid in sorted(uids)]


def test_datacomp_finds_every_uid_in_a_subset(tmp_path):
    uids = [np.random.default_rng(i).bytes(16).hex() for i in range(500)]
    write(tmp_path / "s.npy", uids[::2])
    halves = np.load(tmp_path / "s.npy")

    def there(uid: str) -> bool:  # as its resharder looks a uid up
        key = np.array([(int(uid[:16], 16), int(uid[16:32], 16))], SUBSET)[0]
        return np.searchsorted(halves, key, "right") - np.searchsorted(halves, key, "left") == 1

    assert [there(uid) for uid in uids] == [True, False] * 250


@pytest.mark.parametrize("count", [0, 1, 9, 10, 999, 1000])
def test_the_file_is_what_numpy_writes(tmp_path, count):
    uids = [f"{i:032x}" for i in range(count)]
    buffer = io.BytesIO()
    np.save(buffer, np.array([(0, i) for i in range(count)], SUBSET))
    assert write(tmp_path / "s.npy", uids) == count
    assert (tmp_path / "s.npy").read_bytes() == buffer.getvalue()


@given(
    shards=st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), max_size=12), max_size=8),
    at_once=st.sampled_from([1, 2, 7, 1000]),
    spread=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_whatever_is_sorted_at_once_the_file_is_that_of_a_sorted_list(tmp_path_factory, shards, at_once, spread):
    """Uids that differ at their beginning and at their end, in shards, some of them empty."""
    path, before = tmp_path_factory.mktemp("subset") / "s.npy", writing.SORTED_AT_ONCE
    named = [[(f"{n:032x}"[:: -1 if spread else 1], copies) for n, copies in shard] for shard in shards]
    counts: dict[str, set[int]] = {}
    for uid, copies in (pair for shard in named for pair in shard):
        counts.setdefault(uid, set()).add(copies)
    tables = [(str(i), pa.table({"uid": pa.array([u for u, _ in shard], pa.string())})) for i, shard in enumerate(named)]
    selected = Selected([np.array([c for _, c in shard], np.int32) for shard in named])
    unlike = sorted(uid for uid, of_pairs in counts.items() if len(of_pairs) > 1)
    writing.SORTED_AT_ONCE = at_once
    try:
        if unlike:
            with pytest.raises(UserError, match=f"{len(unlike)} uids belong to pairs .* such as {unlike[0]}"):
                write_subset(str(path), lambda columns: tables, selected)
            assert not path.exists()
        else:
            wanted = sorted(Counter({uid: min(of_pairs) for uid, of_pairs in counts.items()}).elements())
            assert write_subset(str(path), lambda columns: tables, selected) == len(wanted)
            assert written(path) == wanted
    finally:
        writing.SORTED_AT_ONCE = before


def test_where_no_uid_repeats_only_kept_pairs_are_looked_at(tmp_path):
    write(tmp_path / "a.npy", UIDS, [0, 1, 2, 0] + [1] * 6)
    write(tmp_path / "b.npy", UIDS, [0, 1, 2, 0] + [1] * 6, unique=True)
    assert written(tmp_path / "a.npy") == written(tmp_path / "b.npy") == [UIDS[i] for i in (1, 2, 2, 4, 5, 6, 7, 8, 9)]


def test_a_uid_of_kept_and_other_pairs_is_not_written(tmp_path):
    with pytest.raises(UserError, match=f"2 uids belong to pairs that are kept and to pairs that are not, such as {UIDS[0]}"):
        write(tmp_path / "s.npy", TWICE, [1, 0, 0, 1, 1, 0])
    assert not (tmp_path / "s.npy").exists()


def test_a_uid_whose_pairs_are_all_kept_is_in_the_subset_once(tmp_path):
    assert write(tmp_path / "s.npy", TWICE, [1, 0, 1, 1, 0, 0]) == 2
    assert written(tmp_path / "s.npy") == [UIDS[0], UIDS[2]]


def test_keys_are_those_of_the_kept_pairs(tmp_path, monkeypatch):
    shards = {name: {"uid": TWICE, "index": [0, 1, 3, 4, 5, 7], "score": np.arange(6) + i} for i, name in enumerate("ba")}
    run = open_run(write_scores(tmp_path, shards).folder)
    selected = select(run.of_shards, "score", 0.5)
    for rows in (1, 100):
        monkeypatch.setattr(writing, "ROW_GROUP", rows)
        write_keys(str(tmp_path / "keys.parquet"), run.of_shards, selected)
        written = pq.read_table(tmp_path / "keys.parquet").to_pydict()
        assert written["shard"] == ["a"] * 4 + ["b"] * 2
        assert written["index"] == [3, 4, 5, 7, 5, 7]
        assert written["key"] == ["0002", "0003", "0004", "0005", "0004", "0005"]
        assert written["uid"] == [TWICE[i] for i in (2, 3, 4, 5, 4, 5)]


def test_keys_are_of_the_columns_that_were_selected_from(tmp_path):
    run = open_run(write_scores(tmp_path, {"a": {"uid": UIDS[:3], "score": [1, 2, 3]}}).folder)
    selected = select(run.of_shards, "score", 0.5)
    for uids in (UIDS[:2], UIDS[:4]):
        write_scores(tmp_path, {"a": {"uid": uids, "score": range(len(uids))}})
        with pytest.raises(RunError, match="they have changed meanwhile"):
            write_keys(str(tmp_path / "keys.parquet"), run.of_shards, selected)
    assert not (tmp_path / "keys.parquet").exists()
