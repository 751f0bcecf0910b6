"""The sample, spread over Ray actors. Each of them holds some slices (`ecif.sample`)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from ecif.heads.cross_fit import FittedHeads
from ecif.sample import LinearSystem, Sample, SampleSystem, Shared, Slices
from pipeline.stages.fit.stage import as_tensor
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage
from pipeline.workers.slices import SliceActors


class SampleActors(SliceActors, SampleSystem):
    """The actors that hold the sample, as the reducer sees them.

    Args:
        shared: the sample and the heads.
        fitted: the same heads, grouped by the fold that they never saw.
        repeats: batch permutations that scores are averaged over.
        resources: of the actors.
        progress: advances by 1 with every Gauss-Newton product over the whole sample.
    """

    def __init__(self, shared: Shared, fitted: FittedHeads, repeats: int, resources: Resources, progress: Stage):
        SampleSystem.__init__(self, shared.sample, repeats, fitted)
        sample, nothing = shared.sample, torch.empty(0)
        rest = shared._replace(sample=sample._replace(images=nothing, texts=nothing))
        # Features as arrays, because the actors of a node share those.
        placed = (ray.put(rest), ray.put(sample.images.numpy()), ray.put(sample.texts.numpy()))
        SliceActors.__init__(self, _Slices, placed, sample.places(repeats), resources)
        self.progress = progress

    def each(self, method: str, *arguments: Any) -> Iterator[Any]:
        """Yield what a method of `Slices` returns for each slice, in order."""
        once = [ray.put(a.numpy()) if isinstance(a, Tensor) else a for a in arguments]  # sent once, not with every slice
        answers = super().each("call", method, *once)
        yield from (_tensors(answer) for answer in answers)

    def product(self, systems: list[LinearSystem], vectors: Tensor) -> Tensor:
        """H vectors [n, P] of every system. An actor returns the sum over the slices that it holds."""
        total = self.total("products", systems, ray.put(vectors.numpy()), read=as_tensor)
        self.progress.advance(1)
        return total.clone()  # one actor's array can't be written to


class _Slices:
    """Actor: some slices of the sample."""

    def __init__(self, shared: Shared, images: Any, texts: Any, slices: list[list[tuple[Tensor, ...]]]):
        to = device()
        sample: Sample = shared.sample._replace(images=as_tensor(images), texts=as_tensor(texts))
        self.slices = Slices(shared._replace(sample=sample), slices, to)

    def products(self, first: int, count: int, systems: list[LinearSystem], vectors: Any) -> Any:
        """`Slices.products`, from and to arrays."""
        return self.slices.products(first, count, systems, as_tensor(vectors)).numpy()

    def call(self, at: int, method: str, *arguments: Any) -> Any:
        """Call a method of `Slices`. Tensors travel as arrays, which cost Ray less."""
        given = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
        answer = getattr(self.slices, method)(at, *given)
        return tuple(part.numpy() for part in answer) if isinstance(answer, tuple) else answer.numpy()


def _tensors(answer: Any) -> Any:
    return tuple(map(as_tensor, answer)) if isinstance(answer, tuple) else as_tensor(answer)
