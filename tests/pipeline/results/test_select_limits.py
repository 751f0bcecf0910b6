"""`ecif select` keeps the best of the pairs that may be kept; the share is one of all pairs."""

import re

import numpy as np
import pytest

from jobs.cli import app
from pipeline.errors import UserError
from tests.support.finished import write_scores
from tests.support.subsets import write_uids

UIDS = [np.random.default_rng(i).bytes(16).hex() for i in range(12)]
SCORE = [3.0, 9.0, 7.0, 1.0, 0.0, 8.0, 5.0, 2.0, 6.0, 4.0, 11.0, np.nan]
OTHER = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, np.nan, 0.0, 1.0]


@pytest.fixture
def scored(tmp_path) -> str:
    cut = {"a": slice(0, 5), "b": slice(5, 12)}
    shards = {name: {"uid": UIDS[of], "score": SCORE[of], "other": OTHER[of]} for name, of in cut.items()}
    return write_scores(tmp_path / "run", shards).folder


def select(run: str, out: object, *options: object) -> set[int]:
    """Which pairs are kept."""
    app(["select", run, "--out", str(out), *map(str, options)], standalone_mode=False)
    return {UIDS.index(f"{high:016x}{low:016x}") for high, low in np.load(out).tolist()}


def test_a_condition_alone_keeps_all_of_which_it_holds(scored, tmp_path, capsys):
    kept = select(scored, tmp_path / "s.npy", "--where", "other == 1 and score > 2")
    assert kept == {0, 2, 5, 8}
    assert "4 pairs kept\n" in capsys.readouterr().err


def test_of_the_pairs_that_meet_a_condition_the_best_are_kept_up_to_a_share_of_all(scored, tmp_path):
    options = (scored, tmp_path / "s.npy", "--by", "score", "--where", "other == 1")
    assert select(*options, "--keep", 0.25) == {5, 2, 8}
    assert select(*options, "--keep", 1) == {0, 2, 3, 5, 7, 8}  # not 11, which has no score


def test_a_condition_of_nothing_keeps_nothing(scored, tmp_path):
    assert select(scored, tmp_path / "s.npy", "--by", "score", "--keep", 0.5, "--where", "score > 100") == set()


def subset(path, pairs: set[int], *more: str) -> str:
    return write_uids(str(path), [*(UIDS[i] for i in pairs), *more])


def test_pairs_of_a_subset_are_ranked_among_themselves(scored, tmp_path, capsys):
    within = subset(tmp_path / "a.npy", {0, 1, 3, 4, 10, 11}, "f" * 32)
    assert select(scored, tmp_path / "s.npy", "--by", "score", "--keep", 0.25, "--within", within) == {10, 1, 0}
    assert f"1 pairs of {within} are not in the run, such as {'f' * 32}" in capsys.readouterr().err
    options = ("--by", "score", "--keep", 1, "--within", within, "--where", "other < 1")
    assert select(scored, tmp_path / "s.npy", *options) == {1, 4, 10}


def test_subsets_are_intersected_and_united(scored, tmp_path):
    a, b, c = (subset(tmp_path / f"{name}.npy", of) for name, of in (("a", {0, 1, 2, 11}), ("b", {1, 2, 3, 11}), ("c", {2, 5})))
    assert select(scored, tmp_path / "s.npy", "--within", a, "--within", b) == {1, 2, 11}
    assert select(scored, tmp_path / "s.npy", "--within", a, "--plus", b, "--plus", c) == {0, 1, 2, 3, 5, 11}
    assert select(scored, tmp_path / "s.npy", "--where", "score > 8", "--plus", b) == {1, 10, 2, 3, 11}
    assert select(scored, tmp_path / "s.npy", "--keep", 0.1, "--by", "score", "--plus", c) == {10, 2, 5}
    assert select(scored, tmp_path / "s.npy", "--within", a, "--plus", a) == {0, 1, 2, 11}


def test_a_subset_may_be_a_table_of_keys(scored, tmp_path):
    app(
        ["select", scored, "--out", str(tmp_path / "k.parquet"), "--format", "keys", "--where", "score > 6"],
        standalone_mode=False,
    )
    assert select(scored, tmp_path / "s.npy", "--within", tmp_path / "k.parquet", "--where", "other == 1") == {2, 5}


def test_of_each_shard_or_group_the_same_share_is_kept(scored, tmp_path):
    options = (scored, tmp_path / "s.npy", "--by", "score", "--keep", 0.4)
    assert select(*options, "--per", "shard") == {1, 2, 10, 5, 8}  # 2 of 5 and 3 of 7
    assert select(*options, "--per", "fold", "--where", "score < 8") == {0, 2, 6, 8, 9}  # one group: 5 of 12
    assert select(*options, "--per", "shard", "--where", "other == 1 and score < 3") == {3, 7}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--per", "other", "--by", "score", "--keep", 1), "--per other: the column holds float, not text or integers"),
        (("--per", "shard", "--where", "score > 0", "--by", "score"), "--by score needs --keep"),
        (("--within", "nowhere.npy"), "no subset nowhere.npy"),
        (
            ("--plus", "nowhere.npy", "--keep", 1, "--by", "score", "--sample", "soft-cap"),
            "--plus and --per need --sample best",
        ),
        (("--where", "other = 1"), "--where 'other = 1', character 7: invalid syntax"),
        (("--where", "othr > 1"), "--where 'othr > 1', character 1: no column 'othr': there are index, batch, fold, "),
        (("--where", "score > 0", "--by", "score"), "--by score needs --keep"),
        (
            ("--where", "score > 0", "--sample", "soft-cap", "--keep", 1, "--by", "score"),
            "--where, --within, --plus and --per need",
        ),
    ],
)
def test_what_can_not_be_is_said_and_nothing_is_written(scored, tmp_path, options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        select(scored, tmp_path / "s.npy", *options)
    assert not (tmp_path / "s.npy").exists()
