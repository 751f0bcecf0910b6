"""Planted noise is exactly what its list says, and nothing else changes."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.demo.plant import plant
from tests.support.corpora import EMBEDDED
from tests.support.tars import read_tar

SOURCE = EMBEDDED / "corpus"
SHARDS = sorted(path.stem for path in SOURCE.glob("*.tar"))
SHARE, SEED = 0.2, 3


def read_pairs(folder: Path) -> dict[str, tuple[dict, str, dict]]:
    """By uid: the JSON, the txt and the Parquet row."""
    pairs = {}
    for shard in SHARDS:
        members = dict(read_tar(folder / f"{shard}.tar"))
        rows = {row["uid"]: row for row in pq.read_table(folder / f"{shard}.parquet").to_pylist()}
        for name, data in members.items():
            if name.endswith(".json"):
                fields = json.loads(data)
                pairs[fields["uid"]] = (fields, members[name[:-5] + ".txt"].decode(), rows.pop(fields["uid"]))
        assert not rows
    return pairs


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("planted")
    count = plant(SOURCE, folder / "corpus", folder / "truth.json", SHARE, SEED)
    assert count == len(json.loads((folder / "truth.json").read_text()))
    return folder / "corpus", folder / "truth.json"


def test_exactly_the_listed_pairs_have_another_caption(planted):
    before, after = read_pairs(SOURCE), read_pairs(planted[0])
    listed = json.loads(planted[1].read_text())
    assert listed == sorted(uid for uid in before if before[uid][1] != after[uid][1])
    assert before.keys() == after.keys()


def test_the_share_is_what_was_asked_for(planted):
    asked = round(SHARE * len(read_pairs(SOURCE)))
    assert 0.98 * asked <= len(json.loads(planted[1].read_text())) <= asked  # a swap between equal captions is none


def test_captions_are_swapped_not_made_up(planted):
    before, after = read_pairs(SOURCE), read_pairs(planted[0])
    assert Counter(text for _, text, _ in after.values()) == Counter(text for _, text, _ in before.values())


def test_txt_json_and_parquet_agree_about_it_and_about_all_else_with_the_source(planted):
    before = read_pairs(SOURCE)
    for uid, (fields, text, row) in read_pairs(planted[0]).items():
        assert fields["caption"] == text == row["caption"]
        assert fields | {"caption": before[uid][0]["caption"]} == before[uid][0]
        assert row | {"caption": before[uid][2]["caption"]} == before[uid][2]


def test_images_names_order_and_stats_are_the_source_s(planted):
    for shard in SHARDS:
        before, after = dict(read_tar(SOURCE / f"{shard}.tar")), dict(read_tar(planted[0] / f"{shard}.tar"))
        assert list(before) == list(after)
        assert [name for name in before if name.endswith(".webp") and before[name] != after[name]] == []
        stats = f"{shard}_stats.json"
        assert (planted[0] / stats).read_bytes() == (SOURCE / stats).read_bytes()
        schema = pq.read_schema(SOURCE / f"{shard}.parquet")
        assert pq.read_schema(planted[0] / f"{shard}.parquet").equals(schema)
    assert {path.name for path in planted[0].iterdir()} == {path.name for path in SOURCE.iterdir()}


def test_nothing_in_the_copy_tells_which_pairs_were_swapped(planted):
    swapped = set(json.loads(planted[1].read_text()))
    for i in (0, 2):
        keys = {uid in swapped: set(pair[i]) for uid, pair in read_pairs(planted[0]).items()}
        assert keys[True] == keys[False]


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_pairs(planted, tmp_path):
    plant(SOURCE, tmp_path / "again", tmp_path / "again.json", SHARE, SEED)
    plant(SOURCE, tmp_path / "other", tmp_path / "other.json", SHARE, SEED + 1)
    assert (tmp_path / "again.json").read_bytes() == planted[1].read_bytes()
    assert [p.name for p in planted[0].iterdir() if p.read_bytes() != (tmp_path / "again" / p.name).read_bytes()] == []
    listed, other = set(json.loads(planted[1].read_text())), set(json.loads((tmp_path / "other.json").read_text()))
    assert 0.1 < len(listed & other) / len(listed) < 0.3  # a fifth by chance


def test_no_noise_is_none(tmp_path):
    assert plant(SOURCE, tmp_path / "copy", tmp_path / "truth.json", 0.0, SEED) == 0
    assert read_tar(tmp_path / "copy" / f"{SHARDS[0]}.tar") == read_tar(SOURCE / f"{SHARDS[0]}.tar")
