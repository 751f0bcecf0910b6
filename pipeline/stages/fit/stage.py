"""Stage `fit`: the two heads, fitted on the sample without each fold in turn, and once on all of it."""

import warnings
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.heads import Heads
from ecif.heads.cross_fit import CrossFit, FittedHeads, HowToFit, Refit, Refitter, run_refit
from ecif.sample import Sample
from pipeline.config import Config
from pipeline.run_folder import tensors
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage
from pipeline.workers.run import Run


def fit_heads(run: Run, start: Heads, sample: Sample) -> FittedHeads:
    """Fit the heads of a run, or read them if they exist."""
    how = cross_fit_of(run.config)

    def fit() -> FittedHeads:
        jobs = how.jobs(sample.fold)
        with Stage("fit", len(jobs)) as progress:
            return how.gather(refitter(run.config, run.resources, start, sample, progress)(jobs))

    return tensors.once(run.artifacts.url("heads"), FittedHeads, fit)


def cross_fit_of(config: Config) -> CrossFit:
    """Which fits a run makes."""
    return CrossFit(config.fit.folds, config.fit.seeds, config.fit.checkpoints, config.seed)


def how_to_fit(config: Config, start: Heads) -> HowToFit:
    """The settings of every fit of a run."""
    return HowToFit(start, config.loss.build(), config.batch_size, config.fit.epochs, config.fit.learning_rate)


def refitter(config: Config, resources: Resources, start: Heads, sample: Sample, progress: Stage | None = None) -> Refitter:
    """A function that runs fits as Ray tasks, in parallel, and returns the heads of each in the order of the jobs."""
    run: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_fit)
    # As arrays, because the processes of a node share those.
    shared = ray.put((sample.images.numpy(), sample.texts.numpy(), sample.sizes, how_to_fit(config, start)))

    def refit(jobs: list[Refit]) -> list[list[Heads]]:
        results = [run.remote(shared, job) for job in jobs]
        waiting = list(results)
        while waiting:
            ready, waiting = ray.wait(waiting)
            if progress:
                progress.advance(len(ready))
        return ray.get(results)

    return refit


def as_features(matrix: NDArray[np.float16], to: torch.device) -> Tensor:
    """Stored features as float32 on a device."""
    return torch.from_numpy(matrix.astype(np.float32)).to(to)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor over an array that processes share. It must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the array is read-only
        return torch.from_numpy(array)


def _fit(shared: tuple[NDArray[np.float16], NDArray[np.float16], list[int], HowToFit], job: Refit) -> list[Heads]:
    images, texts, sizes, how = shared
    how = how._replace(start=how.start.to(device()))
    batches = list(torch.arange(len(images)).split(sizes))
    return run_refit(how, as_tensor(images), as_tensor(texts), batches, job)
