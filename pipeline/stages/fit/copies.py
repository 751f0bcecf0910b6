"""Stage `fit`, before anything is fitted: which sampled pairs are copies of each other, and so share a fold (`ecif.copies`)."""

from functools import cache
from typing import Any

import ray
from numpy.typing import NDArray

from ecif.copies import Copies
from ecif.sample import Sample
from pipeline import storage
from pipeline.errors import RunError
from pipeline.run_folder import tensors
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.fit.sample import Sampled, read_sampled
from pipeline.stages.fit.stage import ReadSample, as_tensor
from pipeline.workers.cluster import device
from pipeline.workers.run import Run


def group_sample(run: Run, corpus: Dataset) -> ReadSample:
    """The sample of a run, in the folds of its groups of copies. Groups that exist are read.

    Returns:
        A function that returns the sample. It is read at the first call, so a run that computes nothing does not read it.

    Raises:
        RunError: the corpus has too few usable pairs for the folds, or too few of its images are no copies of each other.
    """

    @cache
    def read() -> Sample:
        sampled = read_sampled(corpus, run.config, run.resources)
        return sampled.in_folds(tensors.once(run.artifacts.url("copies"), Copies, lambda: _group(run, sampled)))

    if not storage.exists(run.artifacts.url("copies")):
        read()
    return read


def _group(run: Run, sampled: Sampled) -> Copies:
    """Group the copies, on a worker."""
    task: Any = ray.remote(**run.resources.actor, max_retries=2, max_calls=0)(_find)
    features = ray.put(sampled.images.numpy()), ray.put(sampled.texts.numpy())
    rest = sampled._replace(images=sampled.images[:0], texts=sampled.texts[:0])
    found: Copies = ray.get(task.remote(*features, rest, run.config.fit.folds, run.config.seed))
    try:
        found.check()
    except ValueError as error:
        raise RunError(str(error)) from None
    return found


def _find(images: NDArray[Any], texts: NDArray[Any], rest: Sampled, folds: int, seed: int) -> Copies:
    to = device()
    return rest._replace(images=as_tensor(images), texts=as_tensor(texts)).find_copies(folds, seed, to)
