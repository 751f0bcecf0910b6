"""Stage `fit`: the two heads, fitted on the sample without each fold in turn, and once on all of it."""

from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.heads import Heads
from ecif.heads.fit import fit, fixed_batches, reshuffled
from pipeline.config import Config
from pipeline.run_folder import tensors as stored
from pipeline.stages.fit.sample import Sample
from pipeline.stages.losses import loss_of
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage


class FittedHeads(NamedTuple):
    """What `fit` leaves: heads for calibration, and heads that score pairs out of sample.

    Every fit leaves `fit.checkpoints` sets of heads on its way. Influence is averaged over them; the last is the fitted one.
    """

    path: list[Heads]  # [checkpoints] of the fit on all of the sample
    folds: list[list[Heads]]  # [K][seeds x checkpoints]; folds[f] never saw fold f

    @property
    def full(self) -> Heads:
        """Fitted on all of the sample."""
        return self.path[-1]


class Refit(NamedTuple):
    """One fit of the heads on a part of the sample."""

    keep: NDArray[np.bool_]  # [N] pairs that stay
    seed: int  # of the order of the batches
    new_batches: bool = False  # deal them anew every epoch, in as many steps as for all pairs; else holes stay where they were


def read_heads(url: str) -> FittedHeads:
    """Heads that an earlier call wrote; FileNotFoundError if there are none."""
    tensors, facts = stored.read(url)
    every, checkpoints, fits = stored.unpack(tensors), facts["checkpoints"], facts["checkpoints"] * facts["seeds"]
    return FittedHeads(every[:checkpoints], [every[i : i + fits] for i in range(checkpoints, len(every), fits)])


def fit_heads(url: str, start: Heads, sample: Sample, config: Config, resources: Resources) -> FittedHeads:
    """Fit the heads of a run, or read them if they are there."""
    try:
        return read_heads(url)
    except FileNotFoundError:
        pass
    jobs = [Refit(np.ones(len(sample.fold), bool), config.seed)]
    jobs += [Refit(sample.fold != f, config.seed + s) for f in range(config.fit.folds) for s in range(config.fit.seeds)]
    with Stage("fit", len(jobs)) as progress:
        paths = fit_all(start, sample, jobs, config, resources, progress, config.fit.checkpoints)
    facts = {"folds": config.fit.folds, "seeds": config.fit.seeds, "checkpoints": config.fit.checkpoints}
    stored.write(url, stored.pack([heads for path in paths for heads in path]), pairs=len(sample.fold), **facts)
    return read_heads(url)


def refit_all(
    start: Heads, sample: Sample, jobs: list[Refit], config: Config, resources: Resources, progress: Stage | None = None
) -> list[Heads]:
    """The heads of each job, fitted to the end."""
    return [path[-1] for path in fit_all(start, sample, jobs, config, resources, progress, 1)]


def fit_all(
    start: Heads,
    sample: Sample,
    jobs: list[Refit],
    config: Config,
    resources: Resources,
    progress: Stage | None,
    checkpoints: int,
) -> list[list[Heads]]:
    """Fit once for each job, on as many actors' worth of resources as there are; checkpoints in the order of the jobs."""
    run: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_fit)
    shared = ray.put((sample, start, config, checkpoints))
    results = [run.remote(shared, job) for job in jobs]
    waiting = list(results)
    while waiting:
        ready, waiting = ray.wait(waiting)
        if progress:
            progress.advance(len(ready))
    return ray.get(results)


def as_features(matrix: NDArray[np.float16], to: torch.device) -> Tensor:
    """Stored features as float32 on a device."""
    return torch.from_numpy(matrix.astype(np.float32)).to(to)


def _fit(shared: tuple[Sample, Heads, Config, int], job: Refit) -> list[Heads]:
    sample, start, config, checkpoints = shared
    to = device()
    images, texts = sample.images, sample.texts
    if job.new_batches:
        images, texts = images[job.keep], texts[job.keep]
        epoch = reshuffled(len(images), config.batch_size, max(1, len(job.keep) // config.batch_size))
    else:
        epoch = fixed_batches([torch.from_numpy(rows[job.keep[rows]]) for rows in sample.batches()])
    path = fit(
        start.to(to),
        as_features(images, to),
        as_features(texts, to),
        epoch,
        batch_size=config.batch_size,
        epochs=config.fit.epochs,
        learning_rate=config.fit.learning_rate,
        seed=job.seed,
        loss=loss_of(config),
        checkpoints=checkpoints,
    )
    return [heads._replace(image=heads.image.cpu().clone(), text=heads.text.cpu().clone()) for heads in path]
