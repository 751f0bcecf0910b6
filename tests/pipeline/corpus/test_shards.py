"""Which shards a corpus has, and a split of its pairs that depends on nothing but names and the seed."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.corpus.batches import folds, permutation, segment
from pipeline.corpus.shards import find
from pipeline.errors import UserError
from tests.support.tars import pair, write_tar


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two folders with shards of the same stem, gaps in the numbering, and what img2dataset leaves beside them."""
    for name in ("a/00000", "a/00002", "a/00010", "b/00000", "b/more/00001"):
        write_tar(tmp_path / f"{name}.tar", pair("0"))
        for beside in (".parquet", "_stats.json", ".tar.tmp"):
            (tmp_path / f"{name}{beside}").write_bytes(b"beside")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{}/a", ["00000", "00002", "00010"]),
        ("{}/a/", ["00000", "00002", "00010"]),
        ("{}/a/*.tar", ["00000", "00002", "00010"]),
        ("{}/a/000?0.tar", ["00000", "00010"]),
        ("{}/a/0000[12].tar", ["00002"]),
        ("{}/a/{{00000,00010}}.tar", ["00000", "00010"]),
        ("{}/a/000{{10..10}}.tar", ["00010"]),
        ("{}/a/00002.tar", ["00002"]),
        ("file://{}/a", ["00000", "00002", "00010"]),
        ("{}", ["a/00000", "a/00002", "a/00010", "b/00000", "b/more/00001"]),
        ("{}/b", ["00000", "more/00001"]),
        ("{}/{{a,b}}/*.tar", ["a/00000", "a/00002", "a/00010", "b/00000"]),
        ("{}/**/00000.tar", ["a/00000", "b/00000"]),
    ],
)
def test_folders_globs_and_braces_give_the_shards_by_name(corpus, pattern, names):
    shards = find(pattern.format(corpus))
    assert [shard.name for shard in shards] == names
    for shard in shards:
        assert shard.source == storage.describe(shard.source.url)
        assert shard.source.size == Path(shard.source.url).stat().st_size


def test_a_list_is_a_union_in_which_no_shard_is_twice(corpus):
    patterns = [f"{corpus}/b/00000.tar", f"{corpus}/a/*.tar", f"{corpus}/a", f"{corpus}/a/00000.tar"]
    assert [shard.name for shard in find(patterns)] == ["a/00000", "a/00002", "a/00010", "b/00000"]


def test_the_corpus_moved_as_a_whole_keeps_its_names(corpus, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "deeper"
    (corpus / "b").rename(moved)
    assert [shard.name for shard in find(str(moved))] == ["00000", "more/00001"]


def test_a_shard_that_is_named_needs_no_listing(corpus, monkeypatch):
    def forbidden(url):
        raise PermissionError("no ListBucket here")

    monkeypatch.setattr(storage, "is_folder", forbidden)
    assert [s.name for s in find(f"{corpus}/a/{{00000,00010}}.tar")] == ["00000", "00010"]
    with pytest.raises(UserError, match="no ListBucket here"):
        find(f"{corpus}/a")


def test_shards_on_two_kinds_of_storage_are_refused(corpus):
    storage.write_bytes("memory://ecif-shards/00000.tar", b"")
    with pytest.raises(UserError, match=r"corpus.shards: shards on one kind of storage.*memory://"):
        find([f"{corpus}/a", "memory://ecif-shards"])


def test_links_are_followed_to_the_shards(corpus):
    (corpus / "links").mkdir()
    for name in ("00000.tar", "00002.tar"):
        (corpus / "links" / name).symlink_to(corpus / "a" / name)
    for pattern in ("links", "links/*.tar", "links/{{00000,00002}}.tar"):
        before = find(f"{corpus}/{pattern}".replace("{{", "{").replace("}}", "}"))
        assert [(s.name, s.source.size) for s in before] == [(s.name, s.source.size) for s in find(f"{corpus}/a")[:2]]
        write_tar(corpus / "a" / "00000.tar", pair("0", caption=f"the same for {pattern}"))
        after = find(f"{corpus}/{pattern}".replace("{{", "{").replace("}}", "}"))
        assert [x == y for x, y in zip(before, after, strict=True)] == [False, True]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{}/none", "no shard or folder {}/none"),
        ("{}/a/{{00000..00002}}.tar", "no shard or folder {}/a/00001.tar"),
        ("{}/a/*.zip", "no .tar shards at {}/a/*.zip"),
        ("{}/empty", "no .tar shards at {}/empty"),
        ("{}/a/00000.tar.gz", "compressed tar; decompress it first"),
        ("{}/a/*.tgz", "compressed tar; decompress it first"),
        ("{}/a/{{0..3.tar", "Unbalanced braces"),
        ("nowhere://{}/a", "Protocol not known"),
    ],
)
def test_shards_that_are_not_there_are_one_line_that_names_the_key(corpus, pattern, says):
    (corpus / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        find(pattern.format(corpus), "targets.clean.shards")
    assert str(caught.value).startswith("targets.clean.shards: ")
    assert says.format(corpus) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pinned_values():
    """Another value here means that every batch, fold and so every score of every run changes: a new major version."""
    assert permutation(8, "batch", "00000", 0, 0).tolist() == [1, 0, 6, 3, 4, 2, 5, 7]
    assert [batch.tolist() for batch in segment(10, 4, "a/00000", 7)] == [[7, 5, 2, 3], [0, 8, 1, 4], [6, 9]]
    assert folds([f"{i:032x}" for i in range(12)], 5, 0).tolist() == [1, 1, 3, 3, 2, 2, 3, 1, 0, 3, 0, 4]


@pytest.mark.parametrize("pairs", [0, 1, 2, 1000])
def test_a_permutation_is_one_and_depends_on_its_key_alone(pairs):
    order = permutation(pairs, "key", 1)
    assert sorted(order.tolist()) == list(range(pairs))
    np.random.seed(0)
    assert np.array_equal(permutation(pairs, "key", 1), order)
    if pairs > 2:
        assert not np.array_equal(permutation(pairs, "key", 2), order)


def test_permutations_favour_no_place():
    first = np.bincount([permutation(5, "key", i)[0] for i in range(2000)], minlength=5)
    assert first.min() > 330  # 400 expected


@pytest.mark.parametrize("batch_size", [2, 3, 8, 16, 1000])
@pytest.mark.parametrize("pairs", [*range(35), 256])
def test_segments_are_a_partition_into_batches_of_a_size_near_the_one_asked_for(pairs, batch_size):
    batches = segment(pairs, batch_size, "00000", 0)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(pairs))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    if pairs >= batch_size:
        # A lone last pair joins too, so batches of 2 may end in one of 3.
        assert max(2, batch_size / 2) <= len(batches[-1]) < max(1.5 * batch_size, 4)
    else:
        assert len(batches) == (pairs > 0)


def test_a_small_last_batch_joins_the_one_before_it():
    assert [len(batch) for batch in segment(19, 8, "00000", 0)] == [8, 11]
    assert [len(batch) for batch in segment(20, 8, "00000", 0)] == [8, 8, 4]
    assert [len(batch) for batch in segment(3, 8, "00000", 0)] == [3]


@pytest.mark.parametrize("other", [("00001", 0, 0), ("00000", 1, 0), ("00000", 0, 1)])
def test_segments_change_with_shard_seed_and_repeat(other):
    assert [b.tolist() for b in segment(64, 8, *other)] != [b.tolist() for b in segment(64, 8, "00000", 0, 0)]


def test_folds_are_balanced():
    sizes = np.bincount(folds([f"{i:032x}" for i in range(5000)], 5, 0))
    assert sizes.sum() == 5000
    assert abs(sizes - 1000).max() < 120  # 4 standard deviations


def test_a_pair_is_in_the_same_fold_wherever_it_is_and_changes_it_with_the_seed():
    uids = [f"{i:032x}" for i in range(1000)]
    assert folds(uids[::-1], 5, 0).tolist() == folds(uids, 5, 0).tolist()[::-1]
    assert folds(uids[10:20], 5, 0).tolist() == folds(uids, 5, 0).tolist()[10:20]
    same = (folds(uids, 5, 0) == folds(uids, 5, 1)).mean()
    assert 0.1 < same < 0.3  # as independent as 5 folds are


def test_no_batch_holds_one_pair_alone_unless_the_shard_does():
    assert [len(b) for b in segment(7, 2, "shard", 0)] == [2, 2, 3]
    assert [len(b) for b in segment(1, 2, "shard", 0)] == [1]
