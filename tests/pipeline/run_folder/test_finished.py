"""A folder opens as the run that finished last in it, or says in one line why not."""

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.errors import RunError, UserError
from pipeline.run_folder import tables
from pipeline.run_folder.finished import Checkpoint, open_run
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


def test_columns_of_one_name_and_several_types_are_read_together(tmp_path):
    run = open_run(write_scores(tmp_path, SHARDS).folder)
    for item, values in zip(storage.listing(run.table, ".parquet"), ([1, 2], [0.5, None]), strict=True):
        table = tables.read_table(item.url)
        storage.write_bytes(item.url, tables.parquet_bytes(table.append_column("sidecar_n", pa.array(values))))
    assert run.scores(["sidecar_n"])["sidecar_n"].to_pylist() == [1, 2, 0.5, None]
