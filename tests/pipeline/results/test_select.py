"""Exactly the best share is selected, and a subset file is what DataComp takes."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.uids import pack, unpack
from pipeline.errors import RunError, UserError
from pipeline.results import select as selecting
from pipeline.results.select import SUBSET, chosen_filter, unambiguous_uids, write_keys
from pipeline.run_folder.finished import open_run
from tests.support.finished import finish, write_scores

UIDS = [f"{i:032x}" for i in range(10)]


def select(scores: pa.Table, by: str, keep: float) -> list[str]:
    """The uids that are kept, in the order of the pairs."""
    return unpack(selecting.select([scores], by, keep).uids)


def write_subset(url: str, uids: list[str]) -> None:
    selecting.write_subset(url, pack(uids))


def table(scores: list[float | None], by: str = "clip_score", uids: list[str] = UIDS, good: str = "high") -> pa.Table:
    schema = pa.schema([pa.field("uid", pa.string()), pa.field(by, pa.float32(), metadata={"good": good})])
    return pa.table([uids[: len(scores)], pa.array(scores, pa.float32())], schema=schema)


@pytest.mark.parametrize(
    ("pairs", "keep", "count"),
    [(10, 0.3, 3), (10, 1, 10), (10, 0.25, 2), (10, 0.35, 4), (10, 0.01, 0), (3, 0.5, 2), (1, 0.4, 0)],
)
def test_exactly_the_rounded_share_is_kept(pairs, keep, count):
    assert len(select(table([float(i) for i in range(pairs)]), "clip_score", keep)) == count


def test_the_schema_says_which_end_is_good():
    assert select(table([-3, 5, math.inf, -1], "score", good="high"), "score", 0.5) == [UIDS[1], UIDS[2]]
    assert select(table([-3, 5, -math.inf, -1], "score", good="low"), "score", 0.5) == [UIDS[0], UIDS[2]]


def test_of_a_column_that_does_not_say_so_high_is_good():
    plain = pa.table({"uid": UIDS[:4], "sidecar_width": [3, 1, 4, 2]})
    assert select(plain, "sidecar_width", 0.5) == [UIDS[0], UIDS[2]]


@pytest.mark.parametrize("good", ["high", "low"])
def test_ties_are_broken_by_uid_whatever_the_order_of_the_rows(good):
    for uids in (UIDS, UIDS[::-1]):
        assert sorted(select(table([1.0] * 10, "score", uids, good), "score", 0.3)) == UIDS[:3]


def test_the_order_of_the_rows_does_not_matter():
    rows = table([3, 1, 1, 2, math.nan, 1, 0, 2, 2, 1])
    for seed in range(5):
        kept = select(rows.take(np.random.default_rng(seed).permutation(10)), "clip_score", 0.5)
        assert sorted(kept) == [UIDS[i] for i in (0, 1, 3, 7, 8)]


@pytest.mark.parametrize("good", ["high", "low"])
def test_what_has_no_score_is_never_kept_but_counts_in_the_share(good):
    some = table([math.nan, 1, None, 2, math.nan, 3, None, 4, None, None], good=good)
    scored = table([1, 2, 3, 4], uids=UIDS[1::2], good=good)
    assert sorted(select(some, "clip_score", 0.3)) == sorted(select(scored, "clip_score", 0.75))
    assert sorted(select(some, "clip_score", 1)) == UIDS[1:9:2]


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, math.nan])
def test_a_share_is_between_0_and_1(keep):
    with pytest.raises(UserError, match="a share of the pairs"):
        select(table([1.0]), "clip_score", keep)


@pytest.mark.parametrize("by", ["uid", "shard", "fold"])
def test_what_identifies_a_pair_is_no_score(by):
    with pytest.raises(UserError, match=by):
        select(pa.table({"uid": UIDS, "shard": UIDS, "fold": range(10)}), by, 0.5)


def test_scores_of_all_shards_by_name(tmp_path):
    shards = {f"b/{i}": {"uid": UIDS[2 * i : 2 * i + 2], "clip_score": [i, i + 0.5]} for i in (2, 0, 1)}
    run = open_run(write_scores(tmp_path, shards).folder)
    assert run.scores()["uid"].to_pylist() == UIDS[:6]
    assert run.scores(["clip_score"]).to_pydict() == {"clip_score": [0, 0.5, 1, 1.5, 2, 2.5]}
    with pytest.raises(UserError, match=r"no column 'clip' .*: there are clip_score$"):
        run.scores(["uid", "clip"])


def test_a_subset_is_sorted_pairs_of_64_bits(tmp_path):
    uids = ["f" * 32, "0" * 16 + "f" * 16, "8" + "0" * 31, "0" * 31 + "1", "0" * 15 + "1" + "0" * 16]
    write_subset(str(tmp_path / "s.npy"), uids)
    halves = np.load(tmp_path / "s.npy", allow_pickle=False)
    assert halves.dtype == np.dtype("u8,u8") == SUBSET
    assert halves.tolist() == [(int(uid[:16], 16), int(uid[16:32], 16)) for uid in sorted(uids)]


def test_datacomp_finds_every_uid_in_a_subset(tmp_path):
    uids = [np.random.default_rng(i).bytes(16).hex() for i in range(500)]
    write_subset(str(tmp_path / "s.npy"), uids[::2])
    halves = np.load(tmp_path / "s.npy")

    def there(uid: str) -> bool:  # as its resharder looks a uid up
        key = np.array([(int(uid[:16], 16), int(uid[16:32], 16))], SUBSET)[0]
        return np.searchsorted(halves, key, "right") - np.searchsorted(halves, key, "left") == 1

    assert [there(uid) for uid in uids] == [True, False] * 250


TWICE = [UIDS[0], UIDS[1], UIDS[0], UIDS[2], UIDS[1], UIDS[3]]  # the uids of six pairs


def test_of_pairs_with_one_uid_those_are_kept_that_are_best():
    scores = pa.table({"uid": TWICE, "score": [6.0, 1.0, 2.0, 5.0, 4.0, 3.0]})
    selected = selecting.select([scores.slice(0, 2), scores.slice(2)], "score", 0.5)
    assert selected.kept.tolist() == [True, False, False, True, True, False]
    with pytest.raises(UserError, match=f"2 uids belong to pairs that are kept and to pairs that are not, such as {UIDS[0]}"):
        unambiguous_uids(selected)


def test_a_uid_whose_pairs_are_all_kept_is_in_the_subset_once():
    scores = pa.table({"uid": TWICE, "score": [6.0, 1.0, 5.0, 4.0, 2.0, 3.0]})
    assert unpack(unambiguous_uids(selecting.select([scores], "score", 0.5))) == [UIDS[0], UIDS[2]]
    assert unpack(unambiguous_uids(selecting.select([scores], "score", 0.01))) == []


def test_ties_of_pairs_with_one_uid_go_by_their_order():
    scores = pa.table({"uid": [UIDS[1], *[UIDS[0]] * 4], "score": [1.0] * 5})
    assert selecting.select([scores], "score", 0.4).kept.tolist() == [False, True, True, False, False]


def test_keys_are_those_of_the_kept_pairs(tmp_path, monkeypatch):
    shards = {name: {"uid": TWICE, "index": [0, 1, 3, 4, 5, 7], "score": np.arange(6) + i} for i, name in enumerate("ba")}
    run = open_run(write_scores(tmp_path, shards).folder)
    selected = selecting.select((part for _, part in run.of_shards(["uid", "score"])), "score", 0.5)
    for rows in (1, 100):
        monkeypatch.setattr(selecting, "ROW_GROUP", rows)
        write_keys(str(tmp_path / "keys.parquet"), run, selected)
        written = pq.read_table(tmp_path / "keys.parquet").to_pydict()
        assert written["shard"] == ["a"] * 4 + ["b"] * 2
        assert written["index"] == [3, 4, 5, 7, 5, 7]
        assert written["key"] == ["0002", "0003", "0004", "0005", "0004", "0005"]
        assert written["uid"] == [TWICE[i] for i in (2, 3, 4, 5, 4, 5)]


def test_keys_are_of_the_columns_that_were_selected_from(tmp_path):
    run = open_run(write_scores(tmp_path, {"a": {"uid": UIDS[:3], "score": [1, 2, 3]}}).folder)
    selected = selecting.select((part for _, part in run.of_shards(["uid", "score"])), "score", 0.5)
    for uids in (UIDS[:2], UIDS[:4]):
        write_scores(tmp_path, {"a": {"uid": uids, "score": range(len(uids))}})
        with pytest.raises(RunError, match="its columns have changed meanwhile"):
            write_keys(str(tmp_path / "keys.parquet"), run, selected)
    assert not (tmp_path / "keys.parquet").exists()


def filters(**keeps: float | None) -> dict[str, dict]:
    """What a checkpoint found out about these targets: what their filters keep."""
    return {name: {} if keep is None else {"filter": {"keep": keep}} for name, keep in keeps.items()}


def chose(folder, *checkpoints: dict[str, dict]) -> str:
    """A run that found this out."""
    finish(folder, "nowhere", *checkpoints)
    return str(folder)


def test_what_is_left_open_is_what_the_run_chose(tmp_path):
    assert chosen_filter(chose(tmp_path, filters(a=0.7)), None, None) == ("filter_a", 0.7)
    assert chosen_filter(chose(tmp_path, filters(a=0.7)), None, 0.5) == ("filter_a", 0.5)
    assert chosen_filter(chose(tmp_path, filters(a=0.7, b=0.9)), "filter_b", None) == ("filter_b", 0.9)
    assert chosen_filter("nowhere", "clip_score", 0.3) == ("clip_score", 0.3)


def test_of_several_checkpoints_the_mean_budget_is_kept(tmp_path):
    run = chose(tmp_path, filters(a=0.7), filters(a=0.9))
    assert chosen_filter(run, None, None) == ("filter_a", pytest.approx(0.8))


@pytest.mark.parametrize(
    ("keeps", "by", "said"),
    [
        ({"a": None}, None, "has no filter of its own"),
        ({"a": 0.7, "b": 0.9}, None, "give --by filter_a or filter_b"),
        ({"a": 0.7}, "clip_score", "--by clip_score needs --keep"),
    ],
)
def test_what_the_run_has_not_chosen_has_to_be_said(tmp_path, keeps, by, said):
    with pytest.raises(UserError, match=said):
        chosen_filter(chose(tmp_path, filters(**keeps)), by, None)
