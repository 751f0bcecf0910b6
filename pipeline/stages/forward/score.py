"""Forward mode's `score`: influence of a shard's pairs, by one JVP a batch and target through both towers."""

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.forward.mode import scores
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.batches import batches_of
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.forward.decode import Members, decode
from pipeline.stages.forward.model import ForwardModel
from pipeline.stages.forward.solve import ForwardDirection, read_fitted
from pipeline.stages.losses import loss_of
from pipeline.workers.run import Run
from pipeline.workers.shards import ShardWorker, missing_tables, over_shards, seconds_a_pair


def score_forward(run: Run, corpus: Dataset) -> float | None:
    """Write the missing tables of every shard.

    Args:
        run: the run.
        corpus: the corpus. Its pairs are decoded again.

    Returns:
        Seconds of computation a pair; None if there was nothing to do.
    """
    missing = missing_tables(run.artifacts, [f"forward_influence/{target}" for target in run.config.targets])
    arguments = (run.config, run.artifacts, corpus, read_fitted(run))
    return seconds_a_pair(
        over_shards("forward score", corpus.accounting(), missing, ForwardScoreShard, arguments, run.resources)
    )


class ForwardScoreShard(ShardWorker):
    """Actor: the tables of a shard, each written as one Parquet object."""

    def __init__(self, config: Config, artifacts: Artifacts, corpus: Dataset, fitted: list[Tensor] | None):
        self.model = ForwardModel(config, fitted)
        urls = {target: artifacts.url(f"forward_directions/{target}") for target in config.targets}
        self.moves = {t: tensors.load(u, ForwardDirection).direction.to(self.model.device) for t, u in urls.items()}
        self.shards = {shard.name: shard for shard in corpus.shards}
        self.config, self.artifacts, self.reading, self.batches = config, artifacts, corpus.reading, batches_of(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score and write the missing tables of one shard; returns what the driver counts."""
        shard, keys = row["shard"], json.loads(row["keys"])
        table = tables.read_table(self.artifacts.table("pairs", shard))
        pairs = Members(self.shards[shard], table["index"].to_numpy(), table["uid"].to_pylist())
        started = time.perf_counter()
        influence = self._influence(pairs, [key.partition("/")[2] for key in keys])
        seconds = time.perf_counter() - started
        index = {"index": pa.array(table["index"].combine_chunks())}
        for key, (positive, negative) in zip(keys, influence, strict=True):
            found = tables.scores_table(index, {"positive": positive, "negative": negative})
            storage.write_bytes(self.artifacts.table(key, shard), tables.parquet_bytes(found))
        return {"pairs": len(table), "seconds": seconds}

    def _influence(self, pairs: Members, targets: list[str]) -> NDArray[np.float32]:
        """Positive and negative parts [T, 2, N], in the batches of the column `batch`."""
        model, moves = self.model, torch.stack([self.moves[target] for target in targets])
        influence = np.empty((len(moves), 2, len(pairs.uid)), np.float32)
        rows = [batch.numpy() for batch in self.batches.of(pairs.shard.name, len(pairs.uid))]
        decoded = decode([pairs.take(r) for r in rows], self.reading, self.config, model.preprocess)
        for at, batch in zip(rows, decoded, strict=True):
            parts = scores(model.logits, model.parameters, model.batch(batch), moves, loss_of(self.config))
            influence[:, 0, at], influence[:, 1, at] = (part.cpu().numpy() for part in parts)
        return influence
