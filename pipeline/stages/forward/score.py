"""Forward mode's `score`: the influence columns of a shard anew, by one JVP a batch and target through both towers."""

import io
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ecif.forward.mode import scores
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.batches import segment
from pipeline.run_folder import tables
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.forward.decode import Members, decode
from pipeline.stages.forward.model import Model
from pipeline.stages.forward.solve import read_forward
from pipeline.stages.losses import loss_of
from pipeline.workers.cluster import Resources
from pipeline.workers.shards import over_shards


def score_forward(
    folder: str,
    corpus: Dataset,
    heads_scores: str,
    forward_url: str,
    fitted: str | None,
    config: Config,
    resources: Resources,
) -> float | None:
    """Write the columns of every shard that has none yet below `folder`; seconds of computation a pair, None for nothing to do.

    Args:
        folder: of the columns.
        corpus: whose pairs are decoded again.
        heads_scores: folder of the columns of the heads: all but the influence are theirs.
        forward_url: where `solve_forward` left the directions.
        fitted: where the fitted parameters are; None for the checkpoint's.
        config: of the run.
        resources: of the actors.
    """
    arguments = (folder, corpus, heads_scores, forward_url, fitted, config)
    rows = over_shards("forward score", folder, corpus, ForwardScoreShard, arguments, resources)
    return sum(row["seconds"] for row in rows) / sum(row["pairs"] for row in rows) if rows else None


class ForwardScoreShard:
    """Actor: the columns of a shard, written as one Parquet object."""

    def __init__(
        self,
        folder: str,
        corpus: Dataset,
        heads_scores: str,
        forward_url: str,
        fitted: str | None,
        config: Config,
    ):
        self.model = Model(config, fitted)
        self.moves = read_forward(forward_url).directions.to(self.model.device)
        self.shards = {shard.name: shard for shard in corpus.shards}
        self.folder, self.heads_scores, self.caption, self.config = folder, heads_scores, corpus.caption, config

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score and write one shard; returns what the driver counts."""
        name = f"{row['shard']}.parquet"
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(self.heads_scores, name))))
        pairs = Members(self.shards[row["shard"]], table["index"].to_numpy(), table["uid"].to_pylist())
        started = time.perf_counter()
        positive, negative = self._influence(pairs)
        seconds = time.perf_counter() - started
        columns: dict[str, NDArray[np.float32]] = {}
        for i, target in enumerate(self.config.targets):
            columns[f"influence_positive_{target}"] = positive[i]
            columns[f"influence_negative_{target}"] = negative[i]
            columns[f"influence_{target}"] = positive[i] + negative[i]
        for column, values in columns.items():
            table = table.set_column(table.column_names.index(column), column, pa.array(values, pa.float32()))
        storage.write_bytes(storage.join(self.folder, name), tables.parquet_bytes(table))
        return {"pairs": len(table), "seconds": seconds}

    def _influence(self, pairs: Members) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(positive, negative), each [T, N], in the batches that the `batch` column records."""
        model = self.model
        positive, negative = np.empty((2, len(self.moves), len(pairs.uid)), np.float32)
        rows = segment(len(pairs.uid), self.config.batch_size, pairs.shard.name, self.config.seed)
        decoded = decode([pairs.take(r) for r in rows], self.caption, self.config, model.preprocess)
        for at, batch in zip(rows, decoded, strict=True):
            parts = scores(model.logits, model.parameters, model.batch(batch), self.moves, loss_of(self.config))
            positive[:, at], negative[:, at] = (part.cpu().numpy() for part in parts)
        return positive, negative
