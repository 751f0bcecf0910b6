"""Stage `fit`: the two heads, fitted on the sample without each fold in turn, and once on all of it."""

from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.fit import fit, fixed_batches
from ecif.heads import Heads
from pipeline import heads as stored
from pipeline.cluster import Resources, device
from pipeline.config import Config
from pipeline.progress import Stage
from pipeline.sample import Sample


class FittedHeads(NamedTuple):
    """What `fit` leaves: heads for calibration, and heads that score pairs out of sample."""

    full: Heads
    folds: list[list[Heads]]  # [K][seeds]; folds[f] never saw fold f


class Refit(NamedTuple):
    """One fit of the heads on a part of the sample."""

    keep: NDArray[np.bool_]  # [N] pairs that stay; the others leave holes in their batches
    seed: int  # of the order of the batches


def read_heads(url: str) -> FittedHeads:
    """Heads that an earlier call wrote; FileNotFoundError if there are none."""
    tensors, facts = stored.read(url)
    full, *rest = stored.unpack(tensors)
    seeds = facts["seeds"]
    return FittedHeads(full, [rest[i : i + seeds] for i in range(0, len(rest), seeds)])


def fit_heads(url: str, start: Heads, sample: Sample, config: Config, resources: Resources) -> FittedHeads:
    """Fit the heads of a run, or read them if they are there."""
    try:
        return read_heads(url)
    except FileNotFoundError:
        pass
    jobs = [Refit(np.ones(len(sample.fold), bool), config.seed)]
    jobs += [Refit(sample.fold != f, config.seed + s) for f in range(config.fit.folds) for s in range(config.fit.seeds)]
    with Stage("fit", len(jobs)) as progress:
        fitted = refit_all(start, sample, jobs, config, resources, progress)
    stored.write(url, stored.pack(fitted), pairs=len(sample.fold), folds=config.fit.folds, seeds=config.fit.seeds)
    return read_heads(url)


def refit_all(
    start: Heads, sample: Sample, jobs: list[Refit], config: Config, resources: Resources, progress: Stage | None = None
) -> list[Heads]:
    """Fit once for each job, on as many actors' worth of resources as there are; results in the order of the jobs."""
    run: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_fit)
    shared = ray.put((sample, start, config))
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


def _fit(shared: tuple[Sample, Heads, Config], job: Refit) -> Heads:
    sample, start, config = shared
    to = device()
    batches = [torch.from_numpy(rows[job.keep[rows]]) for rows in sample.batches()]
    heads = fit(
        start.to(to),
        as_features(sample.images, to),
        as_features(sample.texts, to),
        fixed_batches(batches),
        batch_size=config.batch_size,
        epochs=config.fit.epochs,
        learning_rate=config.fit.learning_rate,
        seed=job.seed,
    )
    return Heads(heads.image.cpu().clone(), heads.text.cpu().clone(), heads.logit_scale)
