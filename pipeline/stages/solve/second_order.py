"""`score.order: 2`: what the second order adds to each pair's influence, in a PCA projection of the heads' gradients.

Prepared once, after `solve`: for every set of heads the curvature of the sample without its fold, each target's gradient and
curvature, all exact in the projection and small. `score` then adds the correction to the first-order columns, which stay exact
in all parameters. A pair is scored by heads that never saw it: its own curvature arrives, and no cap is needed.
"""

from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.heads import Embedded, Heads, embed
from ecif.losses.contrastive import Negative
from ecif.projected.curvature import damped, gauss_newton
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import Projection, pca_of_sample
from ecif.projected.second_order import correction
from ecif.solve import largest_eigenvalue_of_matrix
from pipeline import storage
from pipeline.config import Config
from pipeline.run_folder import tensors as stored
from pipeline.stages.fit.sample import Sample
from pipeline.stages.fit.stage import FittedHeads, as_features
from pipeline.stages.solve.stage import Directions
from pipeline.stages.solve.targets import Target, gradient
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage
from pipeline.workers.slices import MAX_SLICES


class SecondOrder(NamedTuple):
    """The small matrices, k numbers a direction of the heads, for K folds, their seeds and T targets."""

    projection: Projection
    curvature: Tensor  # [K, seeds, k, k] Gauss-Newton of the sample without the fold, undamped
    damping: Tensor  # [K, seeds, T] in its units
    gradients: Tensor  # [K, seeds, T, k] of the targets' losses
    targets: Tensor  # [K, seeds, T, k, k] Gauss-Newton of the targets' losses

    def to(self, device: torch.device) -> "SecondOrder":
        """The same on another device; the projection follows each batch by itself."""
        projection, *rest = self
        return SecondOrder(projection, *(part.to(device) for part in rest))


def read_second_order(url: str) -> SecondOrder:
    """What an earlier call prepared; FileNotFoundError if it has not."""
    tensors, _ = stored.read(url)
    parts = {name: tensors[name] for name in SecondOrder._fields if name != "projection"}
    return SecondOrder(Projection.from_tensors(tensors), **parts)


def prepare(
    url: str,
    fitted: FittedHeads,
    directions: Directions,
    sample: Sample,
    targets: list[Target],
    config: Config,
    resources: Resources,
) -> None:
    """Compute and write the small matrices if they are not there."""
    if storage.exists(url):
        return
    images, texts = (as_features(part, fitted.full.image.device) for part in (sample.images, sample.texts))
    projection = pca_of_sample(fitted.full, images, texts, config.score.order_rank)
    dampings = torch.tensor([directions.facts[target.name]["damping"] for target in targets], dtype=torch.float64)
    systems = [(heads, fold) for fold, seeds in enumerate(fitted.folds) for heads in seeds]
    batches = sample.batches()
    count = min(MAX_SLICES, len(batches))
    run: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_curvature)
    shared = ray.put((sample, systems, projection))
    pending = [[run.remote(shared, i, batches[part::count]) for part in range(count)] for i in range(len(systems))]
    rows = []
    with Stage("order 2", len(systems)) as progress:
        for (heads, _), parts in zip(systems, pending, strict=True):
            curvature = reduce(torch.add, map(ray.get, parts))  # in the order of the slices
            gradients, curvatures = zip(*(_of_target(heads, target, projection, config) for target in targets), strict=True)
            damping = dampings * largest_eigenvalue_of_matrix(curvature)
            rows.append((curvature, damping, torch.stack(gradients), torch.stack(curvatures)))
            progress.advance(1)
    whole = [torch.stack(part).unflatten(0, (config.fit.folds, config.fit.fits)) for part in zip(*rows, strict=True)]
    tensors = dict(zip(SecondOrder._fields[1:], whole, strict=True)) | projection.tensors()
    stored.write(url, tensors, targets=[target.name for target in targets])


class Corrector:
    """The correction of a shard's pairs.

    Args:
        url: where `prepare` left the small matrices.
        negative: exact or Taylor.
        to: the device of the heads.
    """

    def __init__(self, url: str, negative: Negative, to: torch.device):
        self.small = read_second_order(url).to(to)
        self.negative: Negative = negative
        curvature, damping = self.small.curvature.flatten(0, 1), self.small.damping.flatten(0, 1).tolist()
        self.solvers = [[damped(h, d) for d in of_targets] for h, of_targets in zip(curvature, damping, strict=True)]

    def __call__(
        self, fold: int, seed: int, heads: Heads, pairs: Embedded, batches: list[Tensor], mine: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What to add to the influence of the pairs of one fold, and how much of the curvature each makes up.

        Args:
            fold: that the heads never saw.
            seed: of the heads.
            heads: of this fold and seed.
            pairs: all N pairs of the shard under these heads.
            batches: index tensors. A pair in several batches gets the mean over them.
            mine: [N] bool, the pairs of the fold.

        Returns:
            (positive, negative), each [T, N] float32 in loss units, 0 for other pairs; leverage [N], the largest over targets.
        """
        gradients, curvatures = self.small.gradients[fold, seed], self.small.targets[fold, seed]
        solvers = self.solvers[fold * self.small.curvature.shape[1] + seed]
        sums = pairs.u.new_zeros(3, len(gradients), len(mine))
        times = pairs.u.new_zeros(len(mine))
        for rows in batches:
            own = mine[rows].nonzero()[:, 0]
            times[rows[own]] += 1
            if len(rows) < 2 or not len(own):
                continue  # a pair without negatives has no curvature
            batch = project_batch(heads, pairs.take(rows), self.small.projection)
            positive, negative = (part[own] for part in pair_gradients(batch, self.negative))
            for t, solver in enumerate(solvers):
                parts = correction(batch, positive, negative, solver.solve, gradients[t], curvatures[t], True, own)
                sums[:, t, rows[own]] += torch.stack(parts)
        mean = sums / times.clamp_min(1)
        return mean[0], mean[1], mean[2].amax(0)


def _curvature(
    shared: tuple[Sample, list[tuple[Heads, int]], Projection], system: int, batches: list[NDArray[np.int64]]
) -> Tensor:
    """[k, k] float64 of some batches under one set of heads, without the fold that these never saw."""
    sample, systems, projection = shared
    heads, fold = systems[system]
    to = device()
    heads = heads.to(to)
    total = torch.zeros(projection.size, projection.size, dtype=torch.float64, device=to)
    for rows in batches:
        kept = rows[sample.fold[rows] != fold]
        images, texts = as_features(sample.images[kept], to), as_features(sample.texts[kept], to)
        total += gauss_newton(project_batch(heads, embed(heads, images, texts), projection)).double()
    return total.cpu()


def _of_target(heads: Heads, target: Target, projection: Projection, config: Config) -> tuple[Tensor, Tensor]:
    """Gradient [k] and curvature [k, k] of a target's loss."""
    images, texts = (as_features(part, heads.image.device) for part in (target.images, target.texts))
    batches = [embed(heads, images[rows], texts[rows]) for rows in target.batches(config)]
    slope = projection.apply(heads, gradient(heads, target, target.batches(config), config)[None])[0]
    return slope, reduce(torch.add, (gauss_newton(project_batch(heads, batch, projection)) for batch in batches))
