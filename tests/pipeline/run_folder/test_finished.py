"""A folder opens as the run that finished last in it, or says in one line why not."""

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.errors import RunError, UserError
from pipeline.run_folder import tables
from pipeline.run_folder.finished import Checkpoint, Finished, counted, open_run, write_finished
from pipeline.run_folder.tables import Accounting
from tests.support.finished import finish, write_scores

UIDS = [f"{i:032x}" for i in range(4)]
SHARDS = {"00000": {"uid": UIDS[:2], "clip_score": [1, 2]}, "a/00001": {"uid": UIDS[2:], "clip_score": [3, 4]}}


def test_a_run_opens_as_it_was_finished(tmp_path):
    facts = {"clean": {"damping": 0.1, "lds": None, "filter": {"keep": 0.8}}}
    finish(tmp_path, "nowhere", facts, {})
    run = open_run(str(tmp_path))
    assert run.checkpoints == [Checkpoint("def", {}, {}, facts), Checkpoint("def", {}, {}, {})]
    assert (run.folder, run.id, list(run.config.targets)) == (str(tmp_path), "id", ["clean"])


def test_a_folder_that_was_moved_opens_where_it_is(tmp_path):
    write_scores(tmp_path / "before", SHARDS)
    (tmp_path / "before").rename(tmp_path / "after")
    run = open_run(str(tmp_path / "after"))
    assert run.config.run == run.folder == str(tmp_path / "after")
    assert run.scores()["uid"].to_pylist() == UIDS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no finished run there"),
        (b'{"config": {}, "scores": "abc", "features": "def"}', "made by an older version of ecif"),
        (b'{"config": ', "is not JSON"),
        (b'{"config": {"beauty": 1}, "id": "", "checkpoints": []}', "is of no run of version .*beauty"),
        (b'{"checkpoints": []}', "is of no run of version"),
    ],
)
def test_what_is_no_finished_run_is_said(tmp_path, content, said):
    if content is not None:
        storage.write_bytes(str(tmp_path / "run.json"), content)
    with pytest.raises(UserError, match=said):
        open_run(str(tmp_path))


def test_columns_of_two_runs_are_never_taken_for_those_of_one(tmp_path):
    run = open_run(write_scores(tmp_path, SHARDS).folder)
    url = f"{run.table}/a/00001.parquet"
    other = tables.described(tables.read_table(url), [], "another run", "a shard")
    storage.write_bytes(url, tables.parquet_bytes(other))
    with pytest.raises(RunError, match="columns of two runs; wait until the run that writes them has finished"):
        run.scores(["uid"])


def test_columns_that_are_gone_are_said_to_be(tmp_path):
    run = open_run(write_scores(tmp_path, SHARDS).folder)
    for item in storage.listing(run.table, ".parquet"):
        storage.delete(item.url)
    with pytest.raises(UserError, match="holds no columns: the same `ecif run` writes them"):
        run.scores()


def accounting(shard: str, **uids) -> Accounting:
    """Of a shard with two embedded pairs."""
    return Accounting(shard, 1, "", "", 6, 6, 0, 2, 2, {}, 1, None, **uids)


def test_what_is_known_about_uids_is_counted_once_and_recorded(tmp_path, monkeypatch):
    shards = {"00000": {"uid": [UIDS[0], UIDS[1]]}, "a/00001": {"uid": [UIDS[2], UIDS[0]]}}
    run = open_run(write_scores(tmp_path, shards).folder)
    odd = {"without_uid": 1, "other_uid": 1, "other_uid_example": "'7' (a/00001, 0)"}
    done = {"00000": accounting("00000"), "a/00001": accounting("a/00001", **odd)}
    found = counted(run, done)
    assert found.uids == (4, 1, 1, "'7' (a/00001, 0)", 2, UIDS[0])
    write_finished(found)
    assert open_run(str(tmp_path)).uids == found.uids
    monkeypatch.setattr(Finished, "of_shards", None)
    assert counted(run, done).uids == found.uids, "of the same columns"
    with pytest.raises(TypeError):
        counted(run._replace(id="other columns"), done)


def test_exact_copies_of_images_are_counted_over_all_shards_and_recorded(tmp_path):
    hashes = {"00000": [UIDS[3], UIDS[1]], "a/00001": [UIDS[2], UIDS[1]], "b": [UIDS[1], UIDS[2]]}
    shards = {
        shard: {"uid": [f"{3 * i + j:032x}" for j in range(2)], "image_hash": of}
        for i, (shard, of) in enumerate(hashes.items())
    }
    run = open_run(write_scores(tmp_path, shards).folder)
    found = counted(run, {shard: accounting(shard) for shard in shards})
    assert found.exact_copies == (6, 5, "00000 0001")
    said = "5 of 6 pairs have an image that other pairs have too, byte for byte, such as 00000 0001"
    assert found.exact_copies.said() == [said]
    write_finished(found)
    assert open_run(str(tmp_path)).exact_copies == found.exact_copies


def test_without_exact_copies_nothing_is_said_of_them(tmp_path):
    run = open_run(write_scores(tmp_path, SHARDS).folder)
    assert counted(run, {shard: accounting(shard) for shard in SHARDS}).exact_copies.said() == []


def test_columns_of_one_name_and_several_types_are_read_together(tmp_path):
    run = open_run(write_scores(tmp_path, SHARDS).folder)
    for item, values in zip(storage.listing(run.table, ".parquet"), ([1, 2], [0.5, None]), strict=True):
        table = tables.read_table(item.url)
        storage.write_bytes(item.url, tables.parquet_bytes(table.append_column("sidecar_n", pa.array(values))))
    assert run.scores(["sidecar_n"])["sidecar_n"].to_pylist() == [1, 2, 0.5, None]
