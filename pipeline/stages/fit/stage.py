"""Stage `fit`: the two heads, fitted on the sample without each fold in turn, and once on all of it.

How they are fitted is chosen first (`ecif.fit_choice`). All later fits of the run follow the choice: those that calibrate the
damping, those that judge filters, and those that judge the run.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.fit_choice import FitChoice, Fits, Grid, choose_fit
from ecif.heads import Heads
from ecif.heads.cross_fit import NO_FIT, CrossFit, FittedHeads, HowToFit, Hyperparameters, Job, Refitter, run_fits, together
from ecif.sample import Sample
from pipeline.config import Config
from pipeline.console import say
from pipeline.run_folder import tensors
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage
from pipeline.workers.run import Run

ReadSample = Callable[[], Sample]  # the pairs that heads are fitted on; they are read when they are first asked for


def choose_how_to_fit(run: Run, start: Heads, sample: ReadSample) -> FitChoice:
    """Choose how the heads of a run are fitted, or read the choice if it was made before; say what it is."""
    config = run.config

    def choose() -> FitChoice:
        grid = Grid.of(config.fit.learning_rate, config.fit.epochs, config.fit.pull, config.fit.checkpoints)
        how, pairs = how_to_fit(config, start, NO_FIT), sample()

        def try_fits(jobs: list[Job]) -> list[list[Heads]]:
            with Stage("try fits", len(jobs)) as progress:
                return fits(run.resources, how, pairs, progress)(jobs)

        return choose_fit(how, pairs, grid, try_fits, config.seed)

    choice = tensors.once(run.artifacts.url("fit_choice"), FitChoice, choose)
    say(choice.line())
    for line in choice.warnings():
        say(f"warning: {line}", logging.WARNING)
    return choice


def fit_heads(run: Run, how: HowToFit, sample: ReadSample) -> FittedHeads:
    """Fit the heads of a run, or read them if they exist."""
    cross_fit = cross_fit_of(run.config)

    def fit() -> FittedHeads:
        pairs = sample()
        jobs = cross_fit.jobs(pairs.fold)
        with Stage("fit", len(jobs)) as progress:
            return cross_fit.gather(refitter(run.resources, how, pairs, progress)(jobs))

    return tensors.once(run.artifacts.url("heads"), FittedHeads, fit)


def cross_fit_of(config: Config) -> CrossFit:
    """Which fits a run makes."""
    return CrossFit(config.fit.folds, config.fit.seeds, config.fit.checkpoints, config.seed)


def how_to_fit(config: Config, start: Heads, hyperparameters: Hyperparameters) -> HowToFit:
    """The settings of every fit of a run."""
    return HowToFit(start, config.loss.build(), config.batch_size, hyperparameters)


def refitter(resources: Resources, how: HowToFit, sample: Sample, progress: Stage | None = None) -> Refitter:
    """A function that runs fits with one set of hyperparameters, see `fits`."""
    run = fits(resources, how, sample, progress)
    return lambda jobs: run([(how.hyperparameters, job) for job in jobs])


def fits(resources: Resources, how: HowToFit, sample: Sample, progress: Stage | None = None) -> Fits:
    """A function that runs fits as Ray tasks, in parallel, and returns the heads of each in the order of the jobs.

    Each job comes with its own hyperparameters; those of `how` are not read. A task has a group of `together`, which depends on
    the jobs and not on the number of GPUs. So the numbers do not either.
    """
    run: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_fit)
    # As arrays, because the processes of a node share those.
    shared = ray.put((sample.images.numpy(), sample.texts.numpy(), sample.sizes, how))

    def refit(jobs: list[Job]) -> list[list[Heads]]:
        groups = together(jobs, resources.device_type)
        sizes = {run.remote(shared, group): len(group) for group in groups}
        waiting = list(sizes)
        while waiting:
            ready, waiting = ray.wait(waiting)
            if progress:
                progress.advance(sum(sizes[result] for result in ready))
        return [path for paths in ray.get(list(sizes)) for path in paths]

    return refit


def as_features(matrix: NDArray[np.float16], to: torch.device) -> Tensor:
    """Stored features as float32 on a device."""
    return torch.from_numpy(matrix.astype(np.float32)).to(to)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor over an array that processes share. It must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the array is read-only
        return torch.from_numpy(array)


def _fit(shared: tuple[NDArray[np.float16], NDArray[np.float16], list[int], HowToFit], jobs: list[Job]) -> list[list[Heads]]:
    images, texts, sizes, how = shared
    how = how._replace(start=how.start.to(device()))
    batches = list(torch.arange(len(images)).split(sizes))
    return run_fits(how, as_tensor(images), as_tensor(texts), batches, jobs)
