"""What the published tables are of is read from one object, and from a table itself where that is another one now."""

import numpy as np
import pytest

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.shards import Shard
from pipeline.run_folder import tables
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Reading
from pipeline.stages.publish import Publication, publish

SHARDS = ["00000", "a/00001", "b"]
CONFIG = {"corpus": {"shards": "x"}, "model": {"name": "x"}, "targets": {"clean": {"shards": "x"}}}


def write(publication: Publication, shard: str, run: str) -> None:
    table = tables.scores_table({}, {"clip_score": np.ones(4, np.float32)})
    described = tables.described(table, [], run, publication.of_shard(shard))
    storage.write_bytes(publication.url(shard), tables.parquet_bytes(described))


@pytest.fixture
def published(tmp_path) -> tuple[Publication, Dataset]:
    """A run whose tables are all there, and one of a shard that is gone."""
    config = Config.model_validate(CONFIG | {"run": str(tmp_path)})
    publication = Publication(config, [Artifacts(str(tmp_path), {"scores": "0" * 16}, dict.fromkeys(SHARDS, "1" * 16))], None)
    listed = [Shard(name, storage.Object(f"{name}.tar", 7, "etag")) for name in SHARDS]
    corpus = Dataset(str(tmp_path), "fingerprint", listed, Reading())
    for shard in SHARDS:
        corpus.record(Accounting(shard, 7, "etag", "", 8, 8, 0, 4, 4, {}, 1, None))
        write(publication, shard, publication.run)
    storage.write_bytes(publication.url("gone"), b"a table")
    return publication, corpus


def test_tables_that_are_there_are_read_once(published, monkeypatch):
    publication, corpus = published
    assert publish(publication, corpus, None) == set(SHARDS)
    assert not storage.exists(publication.url("gone"))
    asked, read_run = [], tables.read_run
    monkeypatch.setattr(tables, "read_run", lambda url: asked.append(url) or read_run(url))
    assert publication.written().current == {shard: publication.of_shard(shard) for shard in SHARDS}
    assert publish(publication, corpus, None) == set(SHARDS)
    assert asked == []
    write(publication, "b", "another run")
    assert publication.written().current == {shard: publication.of_shard(shard) for shard in SHARDS[:2]}
    assert asked == [publication.url("b")]
    storage.delete(publication.compacted_url())
    assert set(publication.written().current) == set(SHARDS[:2]), "from the tables alone"
    assert len(asked) == 4
