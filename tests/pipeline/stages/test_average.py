"""The mean of several checkpoints' columns, shard by shard."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.run_folder.tables import parquet_bytes, scores_table
from pipeline.stages.average import _average


def table(uids: list[str], score: list[float]) -> pa.Table:
    """Columns of two pairs, with two that a sidecar had."""
    identity = {"shard": ["00000"] * 2, "index": [0, 1], "key": ["a", "b"], "uid": uids, "batch": [0, 0], "fold": [0, 1]}
    scores = scores_table(identity, {"clip_score": np.array(score, np.float32)})
    width = pa.array([2**24 + 1, None], pa.int64())  # a float32 can't hold it
    return scores.append_column("sidecar_width", width).append_column("sidecar_licence", pa.array(["cc0", None]))


def averaged(folder, *of: pa.Table) -> tuple[dict, pa.Table | None]:
    folders = [folder / str(i) for i in range(len(of))]
    for place, content in zip(folders, of, strict=True):
        place.mkdir()
        (place / "00000.parquet").write_bytes(parquet_bytes(content))
    mean = folder / "mean"
    row = _average({"shard": "00000", "of": [str(f) for f in folders], "folder": str(mean)})
    return row, pq.read_table(mean / "00000.parquet") if mean.exists() else None


def test_scores_are_averaged_and_what_a_sidecar_had_is_carried_as_it_is(tmp_path):
    row, mean = averaged(tmp_path, table(["u", "v"], [0.25, 0.5]), table(["u", "v"], [0.75, 1.0]))
    assert row["same"]
    assert mean.equals(table(["u", "v"], [0.5, 0.75]))


def test_other_pairs_have_no_mean(tmp_path):
    row, mean = averaged(tmp_path, table(["u", "v"], [0.25, 0.5]), table(["u", "w"], [0.75, 1.0]))
    assert not row["same"]
    assert mean is None
