"""Stage `fit`, before anything is fitted: which sampled pairs are copies of each other, and so share a fold (`ecif.copies`)."""

from typing import Any

import ray
from numpy.typing import NDArray

from ecif.copies import Copies
from ecif.sample import Sample
from pipeline.errors import RunError
from pipeline.run_folder import tensors
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.fit.sample import Sampled, read_sampled
from pipeline.stages.fit.stage import as_tensor
from pipeline.workers.cluster import device
from pipeline.workers.run import Run


def group_sample(run: Run, corpus: Dataset) -> Sample:
    """The sample of a run, in the folds of its groups of copies. Groups that exist are read.

    Raises:
        RunError: the corpus has too few usable pairs for the folds, or too few of its images are no copies of each other.
    """
    sampled = read_sampled(corpus, run.config)

    def find() -> Copies:
        task: Any = ray.remote(**run.resources.actor, max_retries=2, max_calls=0)(_find)
        features = ray.put(sampled.images.numpy()), ray.put(sampled.texts.numpy())
        rest = sampled._replace(images=sampled.images[:0], texts=sampled.texts[:0])
        found: Copies = ray.get(task.remote(*features, rest, run.config.fit.folds, run.config.seed))
        try:
            found.check()
        except ValueError as error:
            raise RunError(str(error)) from None
        return found

    return sampled.in_folds(tensors.once(run.artifacts.url("copies"), Copies, find))


def _find(images: NDArray[Any], texts: NDArray[Any], rest: Sampled, folds: int, seed: int) -> Copies:
    to = device()
    return rest._replace(images=as_tensor(images), texts=as_tensor(texts)).find_copies(folds, seed, to)
