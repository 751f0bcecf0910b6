"""`ecif select --sample soft-cap`: both formats hold a pair as often as it was drawn, and so does an export."""

import re

import numpy as np
import pytest

from jobs.cli import app
from pipeline import storage
from pipeline.errors import UserError
from pipeline.results.soft_cap import SoftCap, sample
from pipeline.results.subset import read_subset
from pipeline.results.write import write_subset
from pipeline.run_folder.finished import open_run
from tests.support.finished import write_scores

UIDS = [np.random.default_rng(i).bytes(16).hex() for i in range(60)]
SCORE = np.linspace(0, 10, 60)


@pytest.fixture
def scored(tmp_path) -> str:
    shards = {f"{i}": {"uid": UIDS[20 * i : 20 * i + 20], "score": SCORE[20 * i : 20 * i + 20]} for i in range(3)}
    return write_scores(tmp_path / "run", shards).folder


def select(run: str, out: object, *options: object) -> None:
    app(["select", run, "--out", str(out), *map(str, options)], standalone_mode=False)


def drawn(run: str, subset: object) -> list[int]:
    """How often each pair of the run is in a subset."""
    found = read_subset(str(subset))
    copies = [found.copies(shard, part) for shard, part in open_run(run).of_shards(["index", "key", "uid"])]
    assert found.missing() == (0, "")
    return np.concatenate(copies).tolist()


SOFT_CAP = ("--by", "score", "--sample", "soft-cap")


@pytest.mark.parametrize(("options", "count"), [(("--draws", 133), 133), (("--keep", 0.5), 30), (("--keep", 2.5), 150)])
def test_both_formats_hold_every_pair_as_often_as_it_was_drawn(scored, tmp_path, capsys, options, count):
    select(scored, tmp_path / "s.npy", *SOFT_CAP, *options)
    select(scored, tmp_path / "s.parquet", *SOFT_CAP, *options, "--format", "keys")
    copies = drawn(scored, tmp_path / "s.npy")
    assert sum(copies) == count
    assert copies == drawn(scored, tmp_path / "s.parquet")
    assert sum(copies[40:]) > 1.5 * sum(copies[:20])
    kept, most = sum(1 for c in copies if c), max(copies)
    assert f"{count} draws of {kept} pairs by score, one pair up to {most} times" in capsys.readouterr().err
    halves = np.load(tmp_path / "s.npy")
    assert (halves == np.sort(halves)).all()  # as DataComp's reader looks uids up

    def times(uid: str) -> int:  # as DataComp's resharder counts a uid
        key = np.array([(int(uid[:16], 16), int(uid[16:32], 16))], halves.dtype)[0]
        return int(np.searchsorted(halves, key, "right") - np.searchsorted(halves, key, "left"))

    assert [times(uid) for uid in UIDS] == copies


def test_how_the_pairs_lie_in_shards_does_not_matter(scored, tmp_path):
    order = np.random.default_rng(0).permutation(60)
    other = {f"{i}": {"uid": [UIDS[n] for n in part], "score": SCORE[part]} for i, part in enumerate(np.split(order, [7, 50]))}
    other_run = write_scores(tmp_path / "other", other).folder
    for run, name in ((scored, "a"), (other_run, "b")):
        select(run, tmp_path / f"{name}.npy", *SOFT_CAP, "--draws", 77)
    assert storage.read_bytes(str(tmp_path / "a.npy")) == storage.read_bytes(str(tmp_path / "b.npy"))
    select(scored, tmp_path / "seed.npy", *SOFT_CAP, "--draws", 77, "--seed", 1)
    assert storage.read_bytes(str(tmp_path / "seed.npy")) != storage.read_bytes(str(tmp_path / "a.npy"))


def test_the_scale_is_one_over_the_standard_deviation_unless_it_is_given(scored):
    def counts(**how: float) -> list[int]:
        return sample(open_run(scored).of_shards, "score", SoftCap(draws=90, **how)).copies.tolist()

    values = np.float32(SCORE).astype(float)
    assert counts() == counts(scale=1 / values.std()) != counts(scale=3.0)


def test_pairs_of_one_uid_that_are_drawn_differently_often_need_keys(tmp_path):
    run = open_run(write_scores(tmp_path, {"0": {"uid": [UIDS[0], UIDS[0], UIDS[1]], "score": [0.0, 5.0, 0.0]}}).folder)
    selected = sample(run.of_shards, "score", SoftCap(draws=50, scale=1.0))
    with pytest.raises(UserError, match=r"1 uids belong to pairs that are drawn more often than others, .*--format keys can"):
        write_subset(str(tmp_path / "s.npy"), run.of_shards, selected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sample", "soft-cap", "--draws", 5, "--keep", 0.5), "give either --keep"),
        (("--sample", "soft-cap"), "--by score needs --keep"),
        (("--sample", "soft-cap", "--draws", 0), "0 draws: a number above 0"),
        (("--sample", "soft-cap", "--keep", -1), "keep -1.0: a share above 0"),
        (("--sample", "soft-cap", "--keep", 1, "--scale", -2), "scale -2.0: a number above 0"),
        (("--sample", "soft-cap", "--keep", 1, "--penalty", 0), "penalty 0.0: a number above 0"),
        (("--keep", 0.5, "--draws", 3), "need --sample soft-cap"),
        (("--keep", 0.5, "--seed", 3), "need --sample soft-cap"),
    ],
)
def test_what_can_not_be_is_said_and_nothing_is_written(scored, tmp_path, options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        select(scored, tmp_path / "s.npy", "--by", "score", *options)
    assert not (tmp_path / "s.npy").exists()
