"""`score.order: 2`: the second-order correction of each pair's influence, in a PCA projection of the heads' gradients.

It is prepared once, after `solve`: for every set of heads the curvature of the sample without their fold, and the gradient and
curvature of each target. All of these are small, and exact in the projection. `score` computes the correction and stores it
beside the first-order influence, which stays exact in all parameters. A pair is scored by heads that never saw it, so its own
curvature is added to the sample's and not subtracted. That is why no cap on the correction is needed.
"""

from functools import reduce
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor

from ecif.heads import Embedded, Heads, embed
from ecif.heads.cross_fit import FittedHeads
from ecif.losses.contrastive import Negative
from ecif.projected.curvature import damped, gauss_newton
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import Projection, pca_of_sample
from ecif.projected.second_order import correction
from ecif.sample import Sample
from ecif.slices import MAX_SLICES
from ecif.solve import largest_eigenvalue_of_matrix
from ecif.targets import Contrastive
from ecif.targets.question import Question
from pipeline import storage
from pipeline.run_folder import tensors
from pipeline.stages.fit.stage import ReadSample
from pipeline.stages.solve.stage import Solved
from pipeline.stages.solve.targets import TargetFeatures
from pipeline.workers.cluster import device
from pipeline.workers.progress import Stage
from pipeline.workers.run import Run


class Curvature(NamedTuple):
    """The sample's curvature under the heads of each fold, in a projection to k dimensions."""

    projection: Projection
    without_fold: Tensor  # [K, fits, k, k] float64, Gauss-Newton of the sample without the fold, undamped


class SecondOrder(NamedTuple):
    """One target in the same projection."""

    gradient: Tensor  # [K, fits, k] of its loss
    curvature: Tensor  # [K, fits, k, k] Gauss-Newton of its loss
    damping: Tensor  # [K, fits] float64, in the units of the sample's curvature


def prepare(run: Run, fitted: FittedHeads, sample: ReadSample, targets: list[TargetFeatures], solved: Solved) -> None:
    """Compute and write the curvature and every `SecondOrder` that is missing."""
    curvature = tensors.once(run.artifacts.url("curvature"), Curvature, lambda: _curvature(run, fitted, sample()))
    for target in targets:
        url = run.artifacts.url(f"second_order/{target.name}")
        if not storage.exists(url):
            question, damping = target.question(run.config), solved.directions[target.name].calibration.damping
            tensors.save(url, _of_target(curvature, fitted, question, damping))


class Corrector:
    """The corrections of a shard's pairs.

    Args:
        curvature: of the sample.
        targets: the T targets.
        negative: form of the negative part, exact or Taylor.
        to: the device of the heads.
    """

    def __init__(self, curvature: Curvature, targets: list[SecondOrder], negative: Negative, to: torch.device):
        self.projection, self.negative = curvature.projection, negative
        self.targets = [SecondOrder(*(part.to(to) for part in target)) for target in targets]
        self.solvers = [
            [[damped(one, t.damping[f, s].item()) for t in targets] for s, one in enumerate(of_fold)]
            for f, of_fold in enumerate(curvature.without_fold.to(to))
        ]  # [K][fits][T]

    def __call__(self, fold: int, fit: int, heads: Heads, pairs: Embedded, batches: list[Tensor], mine: Tensor) -> Tensor:
        """Corrections to the influence of the pairs of one fold, and their leverage: each pair's share of the curvature.

        Args:
            fold: the fold that the heads never saw.
            fit: position of the heads among those of the fold.
            heads: of this fold and fit.
            pairs: all N pairs of the shard under these heads.
            batches: index tensors. A pair in several batches gets the mean over them.
            mine: [N] bool, the pairs of the fold.

        Returns:
            [3, T, N] float32: correction of the positive and of the negative part, in loss units, and leverage. All are 0 for
            pairs of other folds.
        """
        sums = pairs.u.new_zeros(3, len(self.targets), len(mine))
        times = pairs.u.new_zeros(len(mine))
        for rows in batches:
            own = mine[rows].nonzero()[:, 0]
            times[rows[own]] += 1
            if len(rows) < 2 or not len(own):
                continue  # a pair without negatives has no curvature
            batch = project_batch(heads, pairs.take(rows), self.projection)
            positive, negative = (part[own] for part in pair_gradients(batch, self.negative))
            for t, (target, solver) in enumerate(zip(self.targets, self.solvers[fold][fit], strict=True)):
                of_target = target.gradient[fold, fit], target.curvature[fold, fit]
                parts = correction(batch, positive, negative, solver.solve, *of_target, True, own)
                sums[:, t, rows[own]] += torch.stack(parts)
        return sums / times.clamp_min(1)


def _curvature(run: Run, fitted: FittedHeads, sample: Sample) -> Curvature:
    everyone = torch.arange(len(sample.fold))
    features = sample.features(everyone, everyone, torch.device("cpu"))
    projection = pca_of_sample(fitted.full, *features, run.config.score.order_rank)
    systems = [(heads, fold) for fold, fits in enumerate(fitted.folds) for heads in fits]
    batches = sample.batches()
    count = min(MAX_SLICES, len(batches))
    make: Any = ray.remote(**run.resources.actor, max_retries=2, max_calls=0)(_of_slice)
    shared = ray.put((sample, systems, projection))
    pending = [[make.remote(shared, i, batches[part::count]) for part in range(count)] for i in range(len(systems))]
    found = []
    with Stage("order 2", len(systems)) as progress:
        for parts in pending:
            found.append(reduce(torch.add, map(ray.get, parts)))  # in the order of the slices
            progress.advance(1)
    return Curvature(projection, torch.stack(found).unflatten(0, (len(fitted.folds), -1)))


def _of_slice(shared: tuple[Sample, list[tuple[Heads, int]], Projection], system: int, batches: list[Tensor]) -> Tensor:
    """Curvature [k, k] float64 of some batches under one set of heads, without the fold that these heads never saw."""
    sample, systems, projection = shared
    heads, fold = systems[system]
    to = device()
    heads = heads.to(to)
    total = torch.zeros(projection.size, projection.size, dtype=torch.float64, device=to)
    for rows in batches:
        kept = rows[sample.fold[rows] != fold]
        pairs = embed(heads, *sample.features(kept, kept, to))
        total += gauss_newton(project_batch(heads, pairs, projection)).double()
    return total.cpu()


def _of_target(curvature: Curvature, fitted: FittedHeads, question: Question, damping: float) -> SecondOrder:
    """Gradient and curvature of a target's loss under the heads of each fold."""
    loss, projection = question.loss, curvature.projection
    if not isinstance(loss, Contrastive):
        raise TypeError(f"target {question.name}: the curvature of {loss.name} is not known")
    gradients, curvatures = [], []
    for heads in (heads for fits in fitted.folds for heads in fits):
        batches = [embed(heads, loss.images[rows], loss.texts[rows]) for rows in question.batches]
        gradients.append(projection.apply(heads, question.gradient(heads)[None])[0])
        curvatures.append(reduce(torch.add, (gauss_newton(project_batch(heads, one, projection)) for one in batches)))
    shape = curvature.without_fold.shape[:2]
    largest = [largest_eigenvalue_of_matrix(one) for one in curvature.without_fold.flatten(0, 1)]
    return SecondOrder(
        torch.stack(gradients).unflatten(0, shape),
        torch.stack(curvatures).unflatten(0, shape),
        damping * torch.tensor(largest, dtype=torch.float64).view(shape),
    )
