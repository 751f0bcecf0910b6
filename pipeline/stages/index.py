"""Stage `index`: every pair's gradient in few numbers, and the curvature among them, for questions not asked yet.

Everything is taken under the heads that were fitted on all of the sample, in the batches they were fitted in: the index traces
back what a model does to what it was trained on, where `score` judges pairs out of sample. A shard's gradients and its part of
the curvature are a pure function of the shard; the parts are summed in fixed point, so that any order gives the same bytes.
Damping belongs to the question and not to the index: `self_influence` has a folder of its own.
"""

from functools import reduce
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor

from ecif.heads import Heads, embed
from ecif.projected.curvature import CurvatureSum, DampedCurvature, damped, gauss_newton
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import Projection, capped_ranks, pca_of_sample, random_projection
from ecif.projected.relative import gram
from ecif.solve import largest_eigenvalue_of_matrix
from pipeline import storage
from pipeline.config import Config, Index
from pipeline.corpus.batches import batch_numbers, segment
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder import tensors as stored
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.fit.sample import Sample
from pipeline.stages.fit.stage import as_features, read_heads
from pipeline.workers.cluster import Resources, device
from pipeline.workers.shards import over_shards


class IndexFolders(NamedTuple):
    """Where an index is: what every question needs, and what depends on the damping."""

    gradients: str
    self_influence: str


def index(
    folders: IndexFolders,
    dataset: Dataset,
    heads_url: str,
    sample: Sample,
    config: Config,
    settings: Index,
    resources: Resources,
) -> None:
    """Index every shard that is not indexed yet.

    Args:
        folders: to write to.
        dataset: the corpus's features.
        heads_url: where `fit` left the heads.
        sample: what the heads were fitted on; the PCA is of it.
        config: of the run.
        settings: its section `index`.
        resources: of the actors.

    Raises:
        RunError: the curvature is not positive definite after damping.
    """
    _write_projection(folders.gradients, read_heads(heads_url).full, sample, config, settings)
    over_shards("index", folders.gradients, dataset, IndexShard, (folders.gradients, dataset, heads_url, config), resources)
    _write_curvature(folders.gradients, dataset, resources)
    read_curvature(folders.gradients, settings.damping)  # fails here, not in an actor
    arguments = (folders, dataset, settings.damping)
    over_shards("self", folders.self_influence, dataset, SelfInfluenceShard, arguments, resources)


class IndexShard:
    """Actor: the projected gradients of a shard's pairs, and the shard's part of the curvature."""

    def __init__(self, folder: str, dataset: Dataset, heads_url: str, config: Config):
        self.device = device()
        self.heads = read_heads(heads_url).full.to(self.device)
        self.projection = read_projection(folder).to(self.heads.image)
        self.folder, self.dataset, self.config = folder, dataset, config

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Index and write one shard; the table is last, so that where it is the curvature is too."""
        features = tables.read_features(self.dataset.features_folder(row["shard"]), int(row["parts"]))
        pairs = embed(self.heads, as_features(features.images, self.device), as_features(features.texts, self.device))
        batches = segment(len(features.uid), self.config.batch_size, row["shard"], self.config.seed)
        size = self.projection.size
        gradients = [tables.Halves.empty(len(features.uid), size) for _ in ("positive", "negative")]
        curvature = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        for rows in batches:
            batch = project_batch(self.heads, pairs.take(torch.from_numpy(rows).to(self.device)), self.projection)
            for part, halves in zip(pair_gradients(batch, self.config.score.negative), gradients, strict=True):
                halves.put(rows, part.cpu().numpy())
            curvature += gauss_newton(batch).double()
        identity = {
            "shard": [row["shard"]] * len(features.uid),
            "index": features.position,
            "key": features.key,
            "uid": features.uid,
            "batch": batch_numbers(batches),
        }
        total = CurvatureSum.of(curvature.cpu(), len(features.uid))
        _write_sum(storage.join(self.folder, f"{row['shard']}.curvature.safetensors"), total)
        url = storage.join(self.folder, f"{row['shard']}.parquet")
        storage.write_bytes(url, tables.parquet_bytes(tables.index_table(identity, *gradients)))
        return {"pairs": len(features.uid)}


class SelfInfluenceShard:
    """Actor: what of a question's answer belongs to the pair alone."""

    def __init__(self, folders: IndexFolders, dataset: Dataset, damping: float):
        self.curvature = DampedCurvature(read_curvature(folders.gradients, damping).cholesky.to(device()))
        self.folders, self.dataset = folders, dataset

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read one shard of the index, write its self-influence."""
        table = tables.read_table(storage.join(self.folders.gradients, f"{row['shard']}.parquet"))
        positive, negative = (torch.from_numpy(part) for part in tables.read_gradients(table))
        moves = gram(self.curvature.solve(positive), self.curvature.solve(negative))
        own = self.curvature.self_influence(positive + negative)
        url = storage.join(self.folders.self_influence, f"{row['shard']}.parquet")
        answers = tables.self_influence_table(table, moves.cpu().numpy(), own.cpu().numpy())
        storage.write_bytes(url, tables.parquet_bytes(answers))
        return {"pairs": len(table)}


def read_projection(folder: str) -> Projection:
    """The projection of an index; FileNotFoundError if there is none."""
    return Projection.from_tensors(stored.read(storage.join(folder, "projection.safetensors"))[0])


def read_curvature(folder: str, damping: float) -> DampedCurvature:
    """The curvature of all indexed pairs, damped and factorised.

    Args:
        folder: of the index.
        damping: in units of the curvature's largest eigenvalue.

    Raises:
        RunError: it is not positive definite.
    """
    tensors, facts = stored.read(storage.join(folder, "curvature.safetensors"))
    try:
        return damped(_unpack(tensors, facts).matrix(), damping * facts["largest_eigenvalue"])
    except ValueError as error:
        raise RunError(f"index.damping {damping:g}: {error}") from None


def _write_projection(folder: str, heads: Heads, sample: Sample, config: Config, settings: Index) -> None:
    """Once an index: eigenvectors are the same to the bit only on one machine."""
    url = storage.join(folder, "projection.safetensors")
    if storage.exists(url):
        return
    if settings.projection == "pca":
        images, texts = (as_features(part, heads.image.device) for part in (sample.images, sample.texts))
        projection = pca_of_sample(heads, images, texts, settings.rank)
    else:
        projection = random_projection(heads, *capped_ranks(heads, settings.rank), config.seed)
    stored.write(url, projection.tensors())


def _write_curvature(folder: str, dataset: Dataset, resources: Resources) -> None:
    """Sum the parts of all shards."""
    url = storage.join(folder, "curvature.safetensors")
    if storage.exists(url):
        return
    parts = [storage.join(folder, f"{a.shard}.curvature.safetensors") for a in dataset.accounting().values() if a.embedded]
    merge: Any = ray.remote(**resources.reader)(_merge)
    shares = [parts[i :: resources.workers] for i in range(min(resources.workers, len(parts)))]
    total = reduce(CurvatureSum.merge, ray.get([merge.remote(share) for share in shares]))
    _write_sum(url, total, largest_eigenvalue=largest_eigenvalue_of_matrix(total.matrix()))


def _merge(urls: list[str]) -> CurvatureSum:
    """The sum of some parts."""
    return reduce(CurvatureSum.merge, (_unpack(*stored.read(url)) for url in urls))


def _write_sum(url: str, total: CurvatureSum, **facts: Any) -> None:
    """The upper triangle, row after row."""
    size = len(total.units)
    rows, columns = torch.triu_indices(size, size)
    units = {"units": total.units[rows, columns]}
    stored.write(url, units, size=size, fraction_bits=total.fraction_bits, pairs=total.pairs, **facts)


def _unpack(tensors: dict[str, Tensor], facts: dict[str, Any]) -> CurvatureSum:
    """The inverse of `_write_sum`."""
    rows, columns = torch.triu_indices(facts["size"], facts["size"])
    units = torch.zeros(facts["size"], facts["size"], dtype=torch.int64)
    units[rows, columns] = units[columns, rows] = tensors["units"]
    return CurvatureSum(units, facts["fraction_bits"], facts["pairs"])
