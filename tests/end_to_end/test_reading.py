"""What lies beside the shards, and what is wrong with them, through a whole run."""

import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import RunError
from pipeline.run import run
from pipeline.run_folder.tables import parquet_bytes
from tests.support.tars import read_tar


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory):
    """The corpus with img2dataset's sidecars: other uids, a similarity that counts, one pair more counted than is there."""
    folder = tmp_path_factory.mktemp("img2dataset")
    for shard in range(3):
        name = f"{shard:05d}"
        shutil.copyfile(corpus / "corpus" / f"{name}.tar", folder / f"{name}.tar")
        keys = sorted({member.split(".")[0] for member, _ in read_tar(folder / f"{name}.tar")}, reverse=True)
        columns = {"key": keys, "uid": [f"{shard}{i:031d}" for i in range(36)], "similarity": [i / 36 for i in range(36)]}
        (folder / f"{name}.parquet").write_bytes(parquet_bytes(pa.table(columns)))
        (folder / f"{name}_stats.json").write_text(json.dumps({"count": 50, "successes": 36 + (shard == 1)}))
    return folder


def test_sidecars_are_joined_and_counts_compared(shards, configure, local_ray, tmp_path, capsys):
    asked = {"shards": str(shards), "caption": "datacomp", "uid": "sidecar", "sidecar": ["similarity"]}
    outcome = run(configure(tmp_path, corpus=asked))
    assert (outcome.scored, outcome.quarantined, outcome.lost) == (108, {}, 1)
    assert "00001: 36 pairs in the tar, 37 successes in its _stats.json" in capsys.readouterr().err
    table = outcome.scores(["shard", "key", "uid", "sidecar_similarity"])
    beside = {}
    for shard in range(3):
        for row in pq.read_table(shards / f"{shard:05d}.parquet").to_pylist():
            beside[f"{shard:05d}", row["key"]] = (row["uid"], row["similarity"])
    assert {(r["shard"], r["key"]): (r["uid"], r["sidecar_similarity"]) for r in table.to_pylist()} == beside

    # A sidecar that changed is read anew, with all that follows from its uids.
    changed = pq.read_table(shards / "00002.parquet").to_pydict()
    changed["uid"] = [f"f{uid[1:]}" for uid in changed["uid"]]
    before = (shards / "00002.parquet").read_bytes()
    (shards / "00002.parquet").write_bytes(parquet_bytes(pa.table(changed)))
    anew = run(configure(tmp_path, corpus=asked))
    assert anew.finished.id != outcome.finished.id
    assert set(changed["uid"]) < set(anew.scores(["uid"])["uid"].to_pylist())
    (shards / "00002.parquet").write_bytes(before)


def test_a_wrong_caption_key_ends_the_run_with_the_reason_and_the_place(shards, configure, local_ray, tmp_path):
    with pytest.raises(RunError) as ended:
        run(configure(tmp_path, corpus={"shards": str(shards), "caption": "titel"}))
    said, place = str(ended.value).split("; see ")
    assert said.endswith("109 of 109 pairs can't be used (1 lost, 108 missing_caption), more than embed.max_bad_fraction = 0.2")
    rows = [pq.read_table(io.BytesIO(storage.read_bytes(t.url))).to_pylist() for t in storage.listing(place, ".parquet")]
    assert sum(map(len, rows)) == 108


def test_what_fails_in_a_worker_is_one_line(shards, configure, local_ray, tmp_path, capfd):
    shutil.copytree(shards, tmp_path / "shards")
    table = pa.table({"key": ["elsewhere"], "uid": ["0" * 32]})
    (tmp_path / "shards" / "00001.parquet").write_bytes(parquet_bytes(table))
    with pytest.raises(RunError, match=r"^00001: no key of its \.parquet is in the tar, which has '\S+' last$"):
        run(configure(tmp_path / "run", corpus={"shards": str(tmp_path / "shards"), "uid": "sidecar"}))
    assert "Traceback" not in capfd.readouterr().err
