"""Ask an index how any loss depends on every pair. It reads the index and no images.

index = OpenIndex("s3://bucket/run")
query = index.query(images, texts, [torch.arange(len(images))])  # the loss of some pairs; any other loss: index.project
for answers in index.ask(query[None]):
    answers.pairs["uid"], answers.relative_influence[0]
"""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from ecif.heads import embed
from ecif.heads.cross_fit import FittedHeads
from ecif.heads.curvature import loss_gradient
from ecif.projected.projection import Projection
from ecif.projected.relative import loss_relatif, relative_influence, theta_relatif
from pipeline import storage
from pipeline.errors import UserError
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.dataset import in_folder
from pipeline.run_folder.finished import open_run
from pipeline.stages.index import IndexCurvature

PARALLEL = 1e-2  # sine below which the two parts of a pair count as parallel; fp16 gradients resolve no smaller angle


class Answers(NamedTuple):
    """T answers about the N pairs of a shard, float64. Above 0 the pair helps."""

    pairs: pa.Table  # shard, index, key, uid, batch
    positive: Tensor  # [T, N] predicted change of each query's loss, in its units, if the pair is removed as a positive
    negative: Tensor  # [T, N] ... and as a negative
    relative_influence: Tensor  # [T, N] per unit of parameter change, over the plane of both parts (ECIF, constrained form)
    theta_relatif: Tensor  # [T, N] influence per unit of parameter change
    loss_relatif: Tensor  # [T, N] influence per unit of the square root of self-influence

    @property
    def influence(self) -> Tensor:
        """[T, N] of both parts together."""
        return self.positive + self.negative


class OpenIndex:
    """The index of a finished run.

    Args:
        run: its folder, path or URL.

    Raises:
        UserError: no finished run there, or it has no index.
        RunError: the damped curvature is not positive definite.
    """

    def __init__(self, run: str):
        finished = open_run(run)
        settings = finished.config.index
        if settings is None:
            raise UserError(f"{run} has no index: add `index: {{}}` to its configuration and run it again")
        artifacts = finished.checkpoints[0].artifacts(run)
        self.gradients, self.self_influence = artifacts.tables("index"), artifacts.tables("self_influence")
        self.heads = tensors.load(artifacts.url("heads"), FittedHeads).full
        self.projection = tensors.load(artifacts.url("index_projection"), Projection)
        self.curvature = tensors.load(artifacts.url("index_curvature"), IndexCurvature).damped(settings.damping)

    def project(self, gradients: Tensor) -> Tensor:
        """Queries [T, k] of any losses' gradients [T, P] with respect to both heads, image head first."""
        return self.projection.apply(self.heads, gradients)

    def query(self, images: Tensor, texts: Tensor, batches: list[Tensor]) -> Tensor:
        """The query [k] of the contrastive loss of some pairs.

        Args:
            images: [N, d_x] unit features, float32.
            texts: [N, d_t]; row i belongs to image i.
            batches: the rows that share a softmax, an index tensor for each batch.
        """
        embedded = [embed(self.heads, images[rows], texts[rows]) for rows in batches]
        return self.project(loss_gradient(self.heads, embedded)[None])[0]

    def ask(self, queries: Tensor) -> Iterator[Answers]:
        """Answer queries [T, k] about every pair, shard by shard. It reads the index once; a pair costs 2 T k multiply-adds."""
        moved = self.curvature.solve(queries)
        for name in in_folder(self.self_influence, ""):  # lists present shards; the index may hold older ones
            table, own = (tables.read_table(storage.join(folder, name)) for folder in (self.gradients, self.self_influence))
            positive, negative = (moved @ torch.from_numpy(part).double().T for part in tables.read_gradients(table))
            moves, self_influence = (torch.tensor(part) for part in tables.read_self_influence(own))
            both = positive + negative
            yield Answers(
                table.select(tables.INDEXED),
                positive,
                negative,
                relative_influence(positive, negative, moves, PARALLEL),
                theta_relatif(both, moves.sum((1, 2)).clamp_min(0).sqrt()[:, None]),
                loss_relatif(both, self_influence),
            )
