"""Cross-fitting: heads are fitted on all of a sample, and on the sample without each fold.

A pair is scored by heads that were fitted without its fold. The heads are also refitted without random pairs: these refits are
the truth that predictions are compared with.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.heads import Heads
from ecif.heads.fit import Course, Epoch, fit, fixed_batches, reshuffled
from ecif.losses import Loss
from ecif.permutation import permutation

REMOVED = 0.3  # share of the sample that a calibration refit leaves out


class FittedHeads(NamedTuple):
    """Heads for calibration, and heads that score pairs out of sample.

    Every fit saves several checkpoints. Influence is averaged over them. The last one has the fitted heads.
    """

    path: list[Heads]  # [checkpoints] of the fit on all of the sample
    folds: list[list[Heads]]  # [K][seeds x checkpoints]; folds[f] were fitted without fold f

    @property
    def full(self) -> Heads:
        """Fitted on all of the sample."""
        return self.path[-1]

    @property
    def ends(self) -> list[list[Heads]]:
        """[K][seeds] the last checkpoints of each fold's fits."""
        return [fits[len(self.path) - 1 :: len(self.path)] for fits in self.folds]

    def every(self) -> list[Heads]:
        """All heads: those of the path, then those of each fold."""
        return [*self.path, *(heads for fits in self.folds for heads in fits)]


class Hyperparameters(NamedTuple):
    """What `ecif.fit_choice` chooses for all fits of a run."""

    learning_rate: float  # Adam's
    epochs: int  # 0 leaves the heads as they are
    pull: float  # towards the start, see `ecif.heads.fit.fit`


NO_FIT = Hyperparameters(0.0, 0, 0.0)  # the heads stay as they are


class HowToFit(NamedTuple):
    """Start, loss and hyperparameters of a fit."""

    start: Heads
    loss: Loss
    batch_size: int
    hyperparameters: Hyperparameters


class Refit(NamedTuple):
    """One fit of the heads on a part of the sample."""

    keep: Tensor  # [N] bool, the pairs to fit on
    seed: int  # of the order of the batches
    new_batches: bool = False  # reshuffle into full batches, with the steps of a fit on all pairs; else batches only shrink
    checkpoints: int = 1  # number of checkpoints to save


Refitter = Callable[[list[Refit]], list[list[Heads]]]  # runs fits, and returns each one's heads by checkpoint


Job = tuple[Hyperparameters, Refit]
TOGETHER = {"cpu": 1, "cuda": 16}  # the most fits that are one computation: one fills a core, many are needed to fill a GPU


def together(jobs: list[Job], device: str) -> list[list[Job]]:
    """Consecutive jobs that `run_fits` runs as one on a type of device, "cpu" or "cuda"."""
    most = TOGETHER[device]
    groups = list[list[Job]]()
    for job in jobs:
        if groups and len(groups[-1]) < most and _steps(groups[-1][-1]) == _steps(job):
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups


def _steps(job: Job) -> tuple[object, ...]:
    how, refit = job
    return how.learning_rate, how.epochs, refit.new_batches, refit.checkpoints


def run_fits(how: HowToFit, images: Tensor, texts: Tensor, batches: list[Tensor], jobs: list[Job]) -> list[list[Heads]]:
    """Fit on the pairs that each job keeps, with its hyperparameters.

    Args:
        how: start, loss and batch size; its hyperparameters are not read.
        images: [N, d_x] float16 or float32 image features of the sample.
        texts: [N, d_t] text features.
        batches: rows of each batch of the sample.
        jobs: the fits.

    Returns:
        For each job, the heads at its checkpoints on the CPU, see `ecif.heads.fit.fit`.
    """
    to = how.start.image.device
    images, texts = images.float().to(to), texts.float().to(to)
    paths = []
    for group in together(jobs, to.type):
        first, refit = group[0]
        paths += fit(
            how.start,
            images,
            texts,
            [Course(_epoch(how, batches, job), job.seed, own.pull) for own, job in group],
            batch_size=how.batch_size,
            epochs=first.epochs,
            learning_rate=first.learning_rate,
            loss=how.loss,
            checkpoints=refit.checkpoints,
        )
    return [
        [heads._replace(image=heads.image.cpu().clone(), text=heads.text.cpu().clone()) for heads in path] for path in paths
    ]


def _epoch(how: HowToFit, batches: list[Tensor], job: Refit) -> Epoch:
    """The batches of the pairs that a refit keeps."""
    if not job.new_batches:
        return fixed_batches([rows[job.keep[rows]] for rows in batches])
    kept = job.keep.nonzero()[:, 0]
    deal = reshuffled(len(kept), how.batch_size, max(1, len(job.keep) // how.batch_size))
    return lambda order: [kept[rows] for rows in deal(order)]


class CrossFit(NamedTuple):
    """Number and seeds of the fits of a cross-fit."""

    folds: int  # K
    seeds: int  # fits of each fold
    checkpoints: int  # checkpoints of each fit; influence is averaged over them
    seed: int  # of the batch order of each fold's first fit; the next fit has the next seed

    def jobs(self, fold: Tensor) -> list[Refit]:
        """The fit on all pairs, then `seeds` fits without each fold. `fold` [N] is the fold of each pair."""
        everything = torch.ones(len(fold), dtype=torch.bool)
        jobs = [Refit(everything, self.seed, checkpoints=self.checkpoints)]
        for f in range(self.folds):
            jobs += [Refit(fold != f, self.seed + s, checkpoints=self.checkpoints) for s in range(self.seeds)]
        return jobs

    def gather(self, paths: list[list[Heads]]) -> FittedHeads:
        """Sort the heads that `jobs` gave, in their order, by fold."""
        path, *fits = paths
        by_fold = [fits[f * self.seeds : (f + 1) * self.seeds] for f in range(self.folds)]
        return FittedHeads(path, [[heads for fit in of_fold for heads in fit] for of_fold in by_fold])


def removals(pairs: int, count: int, purpose: str, seed: int) -> Tensor:
    """[count, pairs] bool: random subsets for refits to leave out, each a share REMOVED of the pairs."""
    removed = torch.zeros(count, pairs, dtype=torch.bool)
    for r in range(count):
        removed[r, permutation(pairs, purpose, seed, r)[: int(REMOVED * pairs)]] = True
    return removed
