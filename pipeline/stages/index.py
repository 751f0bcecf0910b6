"""Stage `index`: a projected gradient of every pair, and the curvature in the same projection, for questions not asked yet.

All gradients are taken under the heads that were fitted on the whole sample, in the batches of that fit. So the index traces
what a model does back to its training pairs, while `score` judges pairs out of sample. A shard's gradients and its part of the
curvature are a pure function of the shard. The parts are summed in fixed point, so every order of summation gives the same
bytes. The damping is applied when a question is answered. `self_influence` depends on it and the index does not, so they have
separate folders.
"""

from functools import reduce
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor

from ecif.heads import Heads, embed
from ecif.heads.cross_fit import FittedHeads
from ecif.projected.curvature import CurvatureSum, DampedCurvature, damped, gauss_newton
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import Projection, capped_ranks, pca_of_sample, random_projection
from ecif.projected.relative import gram
from ecif.sample import Sample
from ecif.solve import largest_eigenvalue_of_matrix
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.batches import batch_numbers, batches_of
from pipeline.errors import RunError
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Index
from pipeline.stages.fit.stage import ReadSample, as_features
from pipeline.workers.cluster import Resources, device
from pipeline.workers.run import Run
from pipeline.workers.shards import ShardWorker, missing_tables, over_shards


class PackedCurvature(NamedTuple):
    """A `CurvatureSum` as it is stored: the upper triangle, row after row."""

    units: Tensor  # int64 [k (k + 1) / 2]
    size: int  # k
    fraction_bits: int
    pairs: int

    @classmethod
    def of(cls, total: CurvatureSum) -> "PackedCurvature":
        """Pack a sum."""
        size = len(total.units)
        rows, columns = torch.triu_indices(size, size)
        return cls(total.units[rows, columns], size, total.fraction_bits, total.pairs)

    def sum(self) -> CurvatureSum:
        """The inverse of `of`."""
        rows, columns = torch.triu_indices(self.size, self.size)
        units = torch.zeros(self.size, self.size, dtype=torch.int64)
        units[rows, columns] = units[columns, rows] = self.units
        return CurvatureSum(units, self.fraction_bits, self.pairs)


class IndexCurvature(NamedTuple):
    """The curvature of all indexed pairs."""

    total: PackedCurvature
    largest_eigenvalue: float

    def damped(self, damping: float) -> DampedCurvature:
        """Damped and factorised; the damping is in units of the largest eigenvalue.

        Raises:
            RunError: the damped curvature is not positive definite.
        """
        try:
            return damped(self.total.sum().matrix(), damping * self.largest_eigenvalue)
        except ValueError as error:
            raise RunError(f"index.damping {damping:g}: {error}") from None


def index(run: Run, settings: Index, corpus: Dataset, fitted: FittedHeads, sample: ReadSample) -> None:
    """Index every shard that is not indexed yet.

    Args:
        run: the run.
        settings: section `index` of its configuration.
        corpus: features of the corpus.
        fitted: the fitted heads.
        sample: the pairs that the heads were fitted on. The PCA is computed from them.

    Raises:
        RunError: the curvature is not positive definite after damping.
    """
    artifacts, done = run.artifacts, corpus.accounting()
    # Computed once and stored, because eigenvectors differ in their last bits between machines.
    tensors.once(
        artifacts.url("index_projection"), Projection, lambda: _projection(fitted.full, sample(), run.config, settings)
    )
    arguments = (artifacts, corpus.features_folder(""), run.config)
    over_shards("index", done, missing_tables(artifacts, ["index"]), IndexShard, arguments, run.resources)
    curvature = tensors.once(
        artifacts.url("index_curvature"), IndexCurvature, lambda: _sum_curvatures(artifacts, run.resources)
    )
    curvature.damped(settings.damping)  # fails here, not in an actor
    missing = missing_tables(artifacts, ["self_influence"])
    over_shards("self", done, missing, SelfInfluenceShard, (artifacts, settings.damping), run.resources)


class IndexShard(ShardWorker):
    """Actor: the projected gradients of a shard's pairs, and the shard's part of the curvature."""

    def __init__(self, artifacts: Artifacts, features: str, config: Config):
        self.device = device()
        self.heads = tensors.load(artifacts.url("heads"), FittedHeads).full.to(self.device)
        self.projection = tensors.load(artifacts.url("index_projection"), Projection).to(self.heads.image)
        self.artifacts, self.features, self.config, self.batches = artifacts, features, config, batches_of(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Index and write one shard. The table is written last: where it exists, the part of the curvature exists too."""
        shard = row["shard"]
        features = tables.read_features(storage.join(self.features, shard), int(row["parts"]))
        pairs = embed(self.heads, as_features(features.images, self.device), as_features(features.texts, self.device))
        batches = self.batches.of(shard, len(features.uid))
        size = self.projection.size
        gradients = [tables.HalfPrecision.empty(len(features.uid), size) for _ in ("positive", "negative")]
        curvature = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        for rows in batches:
            batch = project_batch(self.heads, pairs.take(rows.to(self.device)), self.projection)
            for part, halves in zip(pair_gradients(batch, self.config.score.negative), gradients, strict=True):
                halves.put(rows.numpy(), part.cpu().numpy())
            curvature += gauss_newton(batch).double()
        total = CurvatureSum.of(curvature.cpu(), len(features.uid))
        tensors.save(curvature_url(self.artifacts, shard), PackedCurvature.of(total))
        identity = tables.identity(shard, features, batch_numbers(batches))
        table = tables.index_table(identity, *gradients)
        storage.write_bytes(self.artifacts.table("index", shard), tables.parquet_bytes(table))
        return {"pairs": len(features.uid)}


class SelfInfluenceShard(ShardWorker):
    """Actor: self-influence of a shard's pairs, and the Gram matrices of their parameter changes."""

    def __init__(self, artifacts: Artifacts, damping: float):
        curvature = tensors.load(artifacts.url("index_curvature"), IndexCurvature).damped(damping)
        self.curvature, self.artifacts = DampedCurvature(curvature.cholesky.to(device())), artifacts

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read one shard of the index, write its self-influence."""
        table = tables.read_table(self.artifacts.table("index", row["shard"]))
        positive, negative = (torch.from_numpy(part) for part in tables.read_gradients(table))
        moves = gram(self.curvature.solve(positive), self.curvature.solve(negative))
        own = self.curvature.self_influence(positive + negative)
        answers = tables.self_influence_table(table, moves.cpu().numpy(), own.cpu().numpy())
        storage.write_bytes(self.artifacts.table("self_influence", row["shard"]), tables.parquet_bytes(answers))
        return {"pairs": len(table)}


def _projection(heads: Heads, sample: Sample, config: Config, settings: Index) -> Projection:
    if settings.projection == "random":
        return random_projection(heads, *capped_ranks(heads, settings.rank), config.seed)
    rows = torch.arange(len(sample.fold))
    return pca_of_sample(heads, *sample.features(rows, rows, heads.image.device), settings.rank)


def _sum_curvatures(artifacts: Artifacts, resources: Resources) -> IndexCurvature:
    """Sum the parts of all shards."""
    parts = [curvature_url(artifacts, shard) for shard in artifacts.shards]
    merge: Any = ray.remote(**resources.reader)(_merge)
    shares = [parts[i :: resources.workers] for i in range(min(resources.workers, len(parts)))]
    total = reduce(CurvatureSum.merge, ray.get([merge.remote(share) for share in shares]))
    return IndexCurvature(PackedCurvature.of(total), largest_eigenvalue_of_matrix(total.matrix()))


def _merge(urls: list[str]) -> CurvatureSum:
    """The sum of some parts."""
    return reduce(CurvatureSum.merge, (tensors.load(url, PackedCurvature).sum() for url in urls))


def curvature_url(artifacts: Artifacts, shard: str) -> str:
    """URL of a shard's part of the curvature."""
    return artifacts.table("index", shard).removesuffix(".parquet") + ".curvature.safetensors"
