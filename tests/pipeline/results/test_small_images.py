"""Whole models see the pairs that a run has scored, in the order of its columns, and rules count them in that order."""

import shutil

import numpy as np
import pytest

from ecif.training import SMALL
from pipeline.errors import RunError, UserError
from pipeline.results.small_images import read_corpus, read_test, rule_of_column, rule_of_subset, tokens_of
from pipeline.run_folder.finished import open_run
from pipeline.sections import Embed, Pairs
from tests.support.exports import caption, make_corpus
from tests.support.finished import Run, write_run, write_scores
from tests.support.subsets import write_uids


@pytest.fixture
def run(tmp_path) -> Run:
    """A run of a corpus with an image that can't be read, which is not scored."""
    return write_run(tmp_path / "run", str(make_corpus(tmp_path / "corpus")))


def test_pairs_are_those_of_the_columns_in_their_order(run):
    finished = open_run(run.folder)
    scored = finished.scores(["shard", "key"]).to_pylist()
    read = read_corpus(finished, SMALL)
    assert read.pixels.shape == (len(scored), 3, 32, 32)
    expected = tokens_of([caption(row["shard"], row["key"]) for row in scored], SMALL)
    assert (read.tokens == expected).all()
    assert len(np.unique(expected, axis=0)) == len(scored)


def test_a_test_set_is_every_pair_that_can_be_read(run, tmp_path):
    of_run, test = read_corpus(open_run(run.folder), SMALL), read_test(Pairs(shards=str(tmp_path / "corpus")), Embed(), SMALL)
    assert sorted(map(tuple, test.tokens)) == sorted(map(tuple, of_run.tokens))
    assert sorted(image.tobytes() for image in test.pixels) == sorted(image.tobytes() for image in of_run.pixels)


def test_a_corpus_that_has_gone_is_said(run, tmp_path):
    shutil.rmtree(tmp_path / "corpus" / "b")
    with pytest.raises(RunError, match="b/00000: gone since the run scored it"):
        read_corpus(open_run(run.folder), SMALL)


def test_rules_count_the_pairs_in_the_order_of_the_columns(tmp_path):
    uids = [f"{i:032x}" for i in range(6)]
    shards = {"b": {"uid": uids[:3], "score": [1, 5, 2]}, "a": {"uid": uids[3:], "score": [6, 0, 3]}}
    finished = open_run(write_scores(tmp_path / "run", shards).folder)
    assert finished.scores(["score"])["score"].to_pylist() == [6, 0, 3, 1, 5, 2]
    assert rule_of_column(finished, "best", "score", 0.5).counts.tolist() == [1, 0, 1, 0, 1, 0]
    write_uids(str(tmp_path / "s.npy"), [uids[1], uids[3], uids[1], uids[1]])
    assert rule_of_subset(finished, "drawn", str(tmp_path / "s.npy")).counts.tolist() == [1, 0, 0, 0, 3, 0]
    write_uids(str(tmp_path / "s.npy"), [uids[1], "f" * 32])
    with pytest.raises(UserError, match=f"1 pairs of .* are not in the run, such as {'f' * 32}"):
        rule_of_subset(finished, "drawn", str(tmp_path / "s.npy"))
