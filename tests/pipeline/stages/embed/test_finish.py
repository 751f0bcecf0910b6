"""What is written last of a shard, and what later stages take it to be a function of."""

import numpy as np
import pytest

from pipeline import storage
from pipeline.corpus.pairs import Pair, Quarantined
from pipeline.corpus.shards import Shard
from pipeline.errors import RunError
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting, features_table, parquet_bytes, part_name, read_features, read_table
from pipeline.sections import Reading
from pipeline.stages.embed.rows import Busy, Embedded, Refused
from pipeline.stages.embed.stage import finish_shard

SHARD = Shard("00000", storage.Object("00000.tar", 7, "etag"))
COUNTS = {"members": 8, "in_pairs": 8, "ignored": 0, "pairs": 4, "embedded": 0}
READ = Accounting("00000", 7, "etag", "00", **COUNTS, quarantined={}, parts=1, broken=None)


def part(count: int, bad: list[tuple[int, str]]) -> Embedded:
    """Of a shard: how many of its pairs are embedded, and which can't be used and why."""
    refused = [Refused("embed", Quarantined(i, str(i), "", why, "")) for i, why in bad]
    return Embedded(0, "00000", 7, count, Busy(), refused, None)


def finished(folder, bad: list[tuple[int, str]], parts: int = 1) -> Accounting:
    """Of a shard of four pairs, some of them quarantined."""
    dataset = Dataset(str(folder), "fingerprint", [SHARD], Reading())
    done = finish_shard(dataset, READ._replace(parts=parts), [part(4 - len(bad), bad)])
    assert dataset.accounting() == Dataset(str(folder), "fingerprint", [SHARD], Reading()).accounting() == {"00000": done}
    return done


def test_the_content_is_of_the_pairs_that_can_be_used_and_of_which_they_are(tmp_path):
    unusable = [
        [],
        [(1, "non_finite_features")],
        [(2, "non_finite_features")],
        [(1, "undecodable_image")],
        [(1, "non_finite_features")],
    ]
    found = [finished(tmp_path / str(i), bad).content for i, bad in enumerate(unusable)]
    assert found[1] == found[4]
    assert len(set(found)) == 4


def test_the_parts_of_a_shard_are_counted_together_in_whatever_order_they_come(tmp_path):
    dataset = Dataset(str(tmp_path), "fingerprint", [SHARD], Reading())
    parts = [part(1, [(2, "bad_json")]), part(0, [(0, "non_finite_features"), (1, "bad_json")])]
    both = [finish_shard(dataset, READ._replace(parts=2), order) for order in (parts, parts[::-1])]
    assert both[0] == both[1]
    assert (both[0].embedded, both[0].quarantined) == (1, {"non_finite_features": 1, "bad_json": 2})
    table = read_table(dataset.quarantine_url("00000"))
    assert (table["index"].to_pylist(), table["reason"].to_pylist()) == (
        [0, 1, 2],
        ["non_finite_features", "bad_json", "bad_json"],
    )


def test_a_shard_that_was_mended_has_an_empty_quarantine_table_and_one_without_bad_pairs_has_none(tmp_path):
    finished(tmp_path / "good", [])
    assert not (tmp_path / "good" / "quarantine").exists()
    for bad in ([(1, "undecodable_image")], []):
        finished(tmp_path / "mended", bad)
        table = read_table(str(tmp_path / "mended" / "quarantine" / "fingerprint" / "00000.parquet"))
        assert table["index"].to_pylist() == [index for index, _ in bad]


@pytest.mark.parametrize(("wrong", "said"), [({"pairs": 5}, "5 pairs, 4 embedded"), ({"ignored": 1}, "8 members, 8 in pairs")])
def test_a_shard_whose_counts_do_not_add_up_is_not_done(tmp_path, wrong, said):
    dataset = Dataset(str(tmp_path), "fingerprint", [SHARD], Reading())
    with pytest.raises(RunError, match=said):
        finish_shard(dataset, READ._replace(**wrong), [part(4, [])])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_what_the_shard_was_before_are_gone(tmp_path, parts):
    folder = tmp_path / "features" / "fingerprint" / "00000"
    for i in (0, 1, 2, 5):
        storage.write_bytes(str(folder / part_name(i)), b"part")
    finished(tmp_path, [], parts)
    assert sorted(path.name for path in folder.iterdir()) == [part_name(i) for i in range(parts)]


@pytest.mark.parametrize("batched", [True, False])
def test_the_only_usable_pair_of_a_shard_of_the_corpus_is_quarantined(tmp_path, batched):
    dataset = Dataset(str(tmp_path), "fingerprint", [SHARD], "txt")
    dataset.batched = batched
    one = Pair(3, "key", "f" * 32, "a caption", np.zeros((3, 1, 1), np.uint8), "0" * 32)
    for i, pairs in enumerate(([], [one])):
        features = np.ones((len(pairs), 2), np.float16)
        url = f"{dataset.features_folder('00000')}/{part_name(i)}"
        storage.write_bytes(url, parquet_bytes(features_table(pairs, features, features)))
    parts = [part(0, [(0, "bad_json"), (1, "bad_json")]), part(1, [(2, "bad_json")])]
    done = finish_shard(dataset, READ._replace(parts=2), parts)
    if not batched:
        assert (done.embedded, done.quarantined) == (1, {"bad_json": 3})
        return
    assert (done.embedded, done.quarantined) == (0, {"bad_json": 3, "alone_in_shard": 1})
    row = read_table(dataset.quarantine_url("00000")).to_pylist()[-1]
    assert (row["index"], row["key"], row["uid"], row["reason"]) == (3, "key", "f" * 32, "alone_in_shard")
    assert read_features(dataset.features_folder("00000"), 2).uid == []
