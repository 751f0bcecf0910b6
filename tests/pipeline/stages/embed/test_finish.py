"""What is written last of a shard, and what later stages take it to be a function of."""

import threading
import time

import numpy as np
import pytest

from pipeline import storage
from pipeline.corpus.pairs import Pair, Quarantined
from pipeline.corpus.shards import Shard
from pipeline.errors import RunError
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting, features_table, parquet_bytes, part_name, read_features, read_table
from pipeline.sections import Reading
from pipeline.stages.embed import finish as finishing
from pipeline.stages.embed.finish import Finishers, finish_shard
from pipeline.stages.embed.rows import Busy, Embedded, Refused
from pipeline.storage.lease import hold_folder

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
    done = finish_shard(dataset.places(), READ._replace(parts=parts), [part(4 - len(bad), bad)])
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


MANY = [f"{i:05d}" for i in range(40)]


@pytest.fixture(params=["threads", "workers"])
def where(request, monkeypatch):
    """Shards are finished in threads of the driver, or by workers."""
    if request.param == "workers":
        request.getfixturevalue("local_ray")
        monkeypatch.setattr(finishing, "FEW", 0)
    return request.param


def finish_all(finishers: Finishers) -> list[tuple[str, int]]:
    """Finish MANY, of which each tenth has two bad pairs; gives the shards and how many pairs of each were embedded."""
    found = []
    for i, name in enumerate(MANY):
        bad = [] if i % 10 else [(0, "bad_json"), (2, "bad_json")]
        finishers.finish(0, READ._replace(shard=name), [part(4 - len(bad), bad)._replace(shard=name)])
        found += finishers.finished()
    found += finishers.finished(wait=True)
    assert {place for place, _ in found} == {0}
    return [(done.shard, done.embedded) for _, done in found]


def objects(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_are_finished_beside_the_loop_with_the_same_bytes_in_the_order_in_which_they_were_given(tmp_path, where):
    dataset = Dataset(str(tmp_path / "beside"), "fingerprint", [], Reading())
    with Finishers([dataset.places()], len(MANY)) as finishers:
        assert finish_all(finishers) == [(name, 4 if i % 10 else 2) for i, name in enumerate(MANY)]
    alone = Dataset(str(tmp_path / "alone"), "fingerprint", [], Reading()).places()
    for i, name in enumerate(MANY):
        bad = [] if i % 10 else [(0, "bad_json"), (2, "bad_json")]
        finish_shard(alone, READ._replace(shard=name), [part(4 - len(bad), bad)])
    assert objects(tmp_path / "beside") == objects(tmp_path / "alone")
    assert len(objects(tmp_path / "alone")) == len(MANY) + 4


def test_shards_are_finished_at_once_so_that_a_slow_store_is_waited_for_once(tmp_path, monkeypatch):
    at_work, most, lock = 0, 0, threading.Lock()

    def slowly(*arguments):
        nonlocal at_work, most
        with lock:
            at_work, most = at_work + 1, max(most, at_work + 1)
        time.sleep(0.2)
        with lock:
            at_work -= 1
        return finish_shard(*arguments)

    monkeypatch.setattr(finishing, "finish_shard", slowly)
    with Finishers([Dataset(str(tmp_path), "fingerprint", [], Reading()).places()], len(MANY)) as finishers:
        assert len(finish_all(finishers)) == len(MANY)
    assert most == storage.THREADS


def test_a_shard_that_does_not_add_up_ends_the_stage(tmp_path, where):
    places = Dataset(str(tmp_path), "fingerprint", [], Reading()).places()
    with pytest.raises(RunError, match="5 pairs, 4 embedded"), Finishers([places], 1) as finishers:
        finishers.finish(0, READ._replace(pairs=5), [part(4, [])])
        list(finishers.finished(wait=True))
    assert not (tmp_path / "shards").exists()


def test_a_run_that_has_lost_its_folder_finishes_no_shard(tmp_path, where):
    """Not even one that it had given away before it could know."""
    run = str(tmp_path)
    places = Dataset(run, "fingerprint", [], Reading()).places()
    ttl = 600.0 if where == "workers" else 1.0  # the driver finds out with its next beat: here after these workers do
    with (
        hold_folder(run, ttl) as lease,
        pytest.raises(RunError, match="another run has taken over"),
        Finishers([places], 1) as finishers,
    ):
        storage.put_bytes(f"{run}/lease/{lease.token + 1:08d}.json", b'{"id": "another run"}')
        time.sleep(ttl if where == "threads" else 0)
        finishers.finish(0, READ, [part(4, [])])
        list(finishers.finished(wait=True))
    assert not (tmp_path / "shards").exists()
