"""What is written last of a shard, and what later stages take it to be a function of."""

import json

import pytest

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import part_name
from pipeline.stages.embed.stage import _finish

SHARD = Shard("00000", storage.Object("00000.tar", 7, "etag"))


def finished(folder, bad: list[tuple[int, str]], parts: int = 1) -> Dataset:
    """A dataset of one shard of four pairs, some of them quarantined."""
    dataset = Dataset(str(folder), "fingerprint", [SHARD], "txt")
    facts = {"shard": "00000", "size": 7, "etag": "etag", "sha256": "00", "members": 8, "in_pairs": 8, "ignored": 0, "pairs": 4}
    facts |= {"embedded": 0, "quarantined": {}, "parts": parts, "broken": None}
    rows = [{"index": i, "key": str(i), "uid": "", "stage": "embed", "reason": why, "detail": ""} for i, why in bad]
    _finish(dataset, facts, [{"embedded": 4 - len(bad), "quarantined": json.dumps(rows)}])
    return dataset


def test_the_content_is_of_the_pairs_that_can_be_used_and_of_which_they_are(tmp_path):
    found = [
        finished(tmp_path / str(i), bad).content()
        for i, bad in enumerate(
            [
                [],
                [(1, "non_finite_features")],
                [(2, "non_finite_features")],
                [(1, "undecodable_image")],
                [(1, "non_finite_features")],
            ]
        )
    ]
    assert found[1] == found[4]
    assert len({tuple(content) for content in found}) == 4


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_what_the_shard_was_before_are_gone(tmp_path, parts):
    folder = tmp_path / "features" / "fingerprint" / "00000"
    for i in (0, 1, 2, 5):
        storage.write_bytes(str(folder / part_name(i)), b"part")
    finished(tmp_path, [], parts)
    assert sorted(path.name for path in folder.iterdir()) == [part_name(i) for i in range(parts)]
