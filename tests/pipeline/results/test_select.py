"""Exactly the best share is selected, and a subset file is what DataComp takes."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.results import select as selecting
from pipeline.results.select import chosen_filter, of_table
from pipeline.run_folder.finished import Finished, open_run
from tests.support.finished import finish, write_scores

UIDS = [f"{i:032x}" for i in range(10)]


def select(scores: pa.Table, by: str, keep: float) -> list[str]:
    """The uids that are kept, in the order of the pairs."""
    return scores["uid"].filter(pa.array(selecting.select(of_table(scores), by, keep).kept)).to_pylist()


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


TWICE = [UIDS[0], UIDS[1], UIDS[0], UIDS[2], UIDS[1], UIDS[3]]  # the uids of six pairs


def test_of_pairs_with_one_uid_those_are_kept_that_are_best():
    scores = pa.table({"uid": TWICE, "score": [6.0, 1.0, 2.0, 5.0, 4.0, 3.0]})
    in_two = [("a", scores.slice(0, 2)), ("b", scores.slice(2))]
    assert selecting.select(lambda columns: in_two, "score", 0.5).kept.tolist() == [True, False, False, True, True, False]


def test_ties_of_pairs_with_one_uid_go_by_their_order():
    scores = pa.table({"uid": [UIDS[1], *[UIDS[0]] * 4], "score": [1.0] * 5})
    assert selecting.select(of_table(scores), "score", 0.4).kept.tolist() == [False, True, True, False, False]


def filters(**keeps: float | None) -> dict[str, dict]:
    """What a checkpoint found out about these targets: what their filters keep."""
    return {name: {} if keep is None else {"filter": {"keep": keep}} for name, keep in keeps.items()}


def chose(folder, *checkpoints: dict[str, dict]) -> Finished:
    """A run that found this out."""
    finish(folder, "nowhere", *checkpoints)
    return open_run(str(folder))


def test_what_is_left_open_is_what_the_run_chose(tmp_path):
    assert chosen_filter(chose(tmp_path, filters(a=0.7)), None, None) == ("filter_a", 0.7)
    assert chosen_filter(chose(tmp_path, filters(a=0.7)), None, 0.5) == ("filter_a", 0.5)
    assert chosen_filter(chose(tmp_path, filters(a=0.7, b=0.9)), "filter_b", None) == ("filter_b", 0.9)
    assert chosen_filter(chose(tmp_path), "clip_score", 0.3) == ("clip_score", 0.3)


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


@given(
    shards=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["x", "y", "é", None])), max_size=9), min_size=1, max_size=4
    ),
    keep=st.floats(0.01, 1),
)
@settings(deadline=None, max_examples=100)
def test_of_each_group_its_share_is_kept(shards, keep):
    """Scores and uids tie; a group has pairs in several shards."""
    pairs = [pair for shard in shards for pair in shard]
    tables = [
        pa.table(
            {
                "uid": pa.array([UIDS[s // 2] for s, _ in shard], pa.string()),
                "score": pa.array([s for s, _ in shard], pa.int32()),
            }
        ).append_column("sidecar_source", pa.array([group for _, group in shard], pa.string()))
        for shard in shards
    ]
    wanted: list[int] = []
    for name in {group for _, group in pairs}:
        group = [i for i, (_, of) in enumerate(pairs) if of == name]
        wanted += sorted(group, key=lambda i: (-pairs[i][0], UIDS[pairs[i][0] // 2], i))[: round(keep * len(group))]
    selected = selecting.select(lambda columns: [("", table) for table in tables], "score", keep, per="sidecar_source")
    assert np.flatnonzero(selected.kept).tolist() == sorted(wanted)


def test_a_column_of_too_many_values_is_not_one_of_groups(monkeypatch):
    monkeypatch.setattr(selecting, "MOST_GROUPS", 9)
    with pytest.raises(UserError, match="--per uid: the column has more than 9 values"):
        selecting.select(of_table(table([1.0] * 10, "score")), "score", 0.5, per="uid")


NUMBER = st.one_of(
    st.none(),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1.0, -1.0]),
    st.floats(width=32),
)
PAIR = st.tuples(st.integers(0, 5), NUMBER)


@given(
    shards=st.lists(st.lists(PAIR, max_size=10), min_size=1, max_size=5),
    keep=st.floats(0.01, 1),
    good=st.sampled_from(["high", "low"]),
    width=st.sampled_from([pa.float32(), pa.float64()]),
)
@settings(deadline=None, max_examples=200)
def test_what_is_kept_is_what_a_sorted_list_keeps(shards, keep, good, width):
    field = pa.field("score", width, metadata={"good": good})
    schema = pa.schema([("uid", pa.string()), field])
    tables = [
        pa.table([[UIDS[u] for u, _ in shard], pa.array([v for _, v in shard], width)], schema=schema) for shard in shards
    ]
    pairs = [pair for shard in shards for pair in shard]
    scored = [i for i, (_, value) in enumerate(pairs) if value is not None and not math.isnan(value)]
    sign = 1 if good == "low" else -1
    best = sorted(scored, key=lambda i: (sign * pairs[i][1], pairs[i][0], i))[: round(keep * len(pairs))]
    selected = selecting.select(lambda columns: [("", table.select(columns)) for table in tables], "score", keep)
    assert np.flatnonzero(selected.kept).tolist() == sorted(best)
    assert selected.count() == (len(best), len(best), min(1, len(best)))


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint64(), pa.uint16(), pa.float16()])
@pytest.mark.parametrize("good", ["high", "low"])
def test_numbers_of_any_kind_are_ranked_exactly(kind, good):
    integers = {"int8": (-128, 127), "int64": (-(2**63), 2**63 - 1), "uint64": (0, 2**64 - 1), "uint16": (0, 65535)}
    low, high = integers.get(str(kind), (-1.5, 1.5))
    values = [high, low, low + 1, high - 1, None, low, high, low + 1]
    schema = pa.schema([("uid", pa.string()), pa.field("score", kind, metadata={"good": good})])
    numbers = pa.array(np.array(values, object) if str(kind) != "halffloat" else [v and np.float16(v) for v in values], kind)
    kept = select(pa.table([UIDS[:8], numbers], schema=schema), "score", 0.5)
    assert kept == [UIDS[i] for i in ((0, 2, 3, 6) if good == "high" else (1, 2, 5, 7))]


@pytest.mark.slow
def test_uids_may_take_more_than_2_gib():
    """A column of strings that is put together can't: 70 chunks of a million pairs, which share their memory."""
    rows, chunks = 1_000_000, 70
    digits = pa.py_buffer(b"".join(b"%032x" % i for i in range(rows)))
    uids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, digits]).cast(pa.binary()).cast(pa.string())
    scores = pa.array(np.arange(rows) // 2, pa.float32())
    every = pa.table({"uid": pa.chunked_array([uids] * chunks), "score": pa.chunked_array([scores] * chunks)})
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        every["uid"].combine_chunks().validate()
    kept = np.flatnonzero(selecting.select(of_table(every), "score", 90 / len(every)).kept)
    best = [rows * chunk + rows - 2 for chunk in range(chunks)]  # the lower one of the two uids with the best score
    assert kept.tolist() == sorted([*best, *(row + 1 for row in best[:20])])
