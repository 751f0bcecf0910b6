"""Stage `average`: the columns of several checkpoints of a model, their mean.

Each checkpoint has its own features, heads and directions, and is scored by itself; the mean of `influence_*` is the mean of
the predicted changes of the target's loss.
"""

import io
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.corpus import sidecar
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder.dataset import Dataset
from pipeline.workers.progress import Stage
from pipeline.workers.shards import as_tasks, written_shards

IDENTITY = ("shard", "index", "key", "uid", "batch", "fold")


def average(folder: str, of: list[str], dataset: Dataset) -> None:
    """Write the mean of every shard's columns that is not there yet.

    Args:
        folder: of the mean.
        of: folders of the columns of each checkpoint.
        dataset: the corpus, as one of the checkpoints saw it.

    Raises:
        RunError: a shard of which the checkpoints scored different pairs, as one that some can't embed (`non_finite_features`).
    """
    pairs = {a.shard: a.embedded for a in dataset.accounting().values() if a.embedded}
    todo = sorted(pairs.keys() - written_shards(folder))
    total = sum(pairs.values())
    with Stage("average", total, total - sum(pairs[shard] for shard in todo)) as progress:
        if not todo:
            return
        rows = [{"shard": shard, "of": of, "folder": folder} for shard in todo]
        for row in as_tasks(rows).map(_average, num_cpus=1).iter_rows():
            if not row["same"]:
                raise RunError(f"{row['shard']}: the checkpoints scored different pairs; see the quarantine tables of each")
            progress.advance(pairs[row["shard"]])


def _average(row: dict[str, Any]) -> dict[str, Any]:
    """Average one shard, if all checkpoints scored the same pairs."""
    urls = [storage.join(folder, f"{row['shard']}.parquet") for folder in row["of"]]
    there = all(storage.exists(url) for url in urls)
    each = [pq.read_table(io.BytesIO(storage.read_bytes(url))) for url in urls] if there else []
    identity = [table.select(IDENTITY) for table in each]
    if not there or any(not identity[0].equals(other) for other in identity):
        return {"shard": row["shard"], "same": False}
    carried = [name for name in each[0].column_names if name.startswith(sidecar.PREFIX)]
    names = [name for name in each[0].column_names if name not in (*IDENTITY, *carried)]
    means: dict[str, Any] = {
        name: np.mean([t[name].to_numpy() for t in each], axis=0, dtype=np.float64).astype(np.float32) for name in names
    }
    table = tables.scores_table({name: identity[0][name].to_pylist() for name in IDENTITY}, means)
    for name in carried:
        table = table.append_column(name, each[0][name])
    storage.write_bytes(storage.join(row["folder"], f"{row['shard']}.parquet"), tables.parquet_bytes(table))
    return {"shard": row["shard"], "same": True}
