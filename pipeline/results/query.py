"""Questions to an index: what a loss owes to every pair, from storage alone.

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
from ecif.heads.curvature import loss_gradient
from ecif.projected.relative import loss_relatif, relative_influence, theta_relatif
from pipeline import storage
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.run import load_run
from pipeline.run_folder import tables
from pipeline.stages.fit.stage import read_heads
from pipeline.stages.index import read_curvature, read_projection

PARALLEL = 1e-2  # the sine below which a pair's two parts span a line: gradients in fp16 tell no smaller angle


class Answers(NamedTuple):
    """T answers about the N pairs of a shard, float64. Above 0 the pair helps."""

    pairs: pa.Table  # shard, index, key, uid, batch
    positive: Tensor  # [T, N] predicted change of each query's loss if the pair is removed as a positive, in its units
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
        RunError: the curvature is not positive definite.
    """

    def __init__(self, run: str):
        facts = load_run(run)
        settings = Config(**facts["config"]).index
        if settings is None:
            raise UserError(f"{run} has no index: add `index: {{}}` to its configuration and run it again")
        self.gradients = storage.join(run, "index", facts["index"])
        self.self_influence = storage.join(run, "self_influence", facts["self_influence"])
        self.heads = read_heads(storage.join(run, "heads", f"{facts['heads']}.safetensors")).full
        self.projection = read_projection(self.gradients)
        self.curvature = read_curvature(self.gradients, settings.damping)

    def project(self, gradients: Tensor) -> Tensor:
        """Queries [T, k] of any losses' gradients [T, P] with respect to both heads, image head first."""
        return self.projection.apply(self.heads, gradients)

    def query(self, images: Tensor, texts: Tensor, batches: list[Tensor]) -> Tensor:
        """The query [k] of the contrastive loss of some pairs.

        Args:
            images: [N, d_x] unit features, float32.
            texts: [N, d_t]; row i belongs to image i.
            batches: rows that share a softmax.
        """
        embedded = [embed(self.heads, images[rows], texts[rows]) for rows in batches]
        return self.project(loss_gradient(self.heads, embedded)[None])[0]

    def ask(self, queries: Tensor) -> Iterator[Answers]:
        """Answer queries [T, k] about every pair, shard by shard: one pass over the index, 2 T k multiply-adds a pair."""
        moved = self.curvature.solve(queries)
        for item in storage.listing(self.gradients, ".parquet"):
            table = tables.read_table(item.url)
            own = tables.read_table(storage.join(self.self_influence, item.url.partition(self.gradients + "/")[2]))
            positive, negative = (moved @ torch.from_numpy(part).double().T for part in tables.read_gradients(table))
            moves, self_influence = (torch.tensor(part) for part in tables.read_self_influence(own))
            both = positive + negative
            yield Answers(
                table.select(tables.IDENTITY),
                positive,
                negative,
                relative_influence(positive, negative, moves, PARALLEL),
                theta_relatif(both, moves.sum((1, 2)).clamp_min(0).sqrt()[:, None]),
                loss_relatif(both, self_influence),
            )
