"""The sample, spread over Ray actors. Each of them holds some slices (`ecif.slices`).

One of them also takes the Lanczos steps, on its GPU if it has one. Vectors and products go from actor to actor. What is next is
all that the driver says.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.columns.bank import Bank
from ecif.heads.cross_fit import FittedHeads
from ecif.sample import Sample
from ecif.slices import LinearSystem, Result, Shared, Slices
from ecif.solve import KrylovSpaces, Lanczos, gradient_norms
from ecif.system import Item, SampleSystem
from pipeline.stages.fit.stage import as_tensor
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage
from pipeline.workers.shards import in_tasks
from pipeline.workers.slices import Block, SliceActors, joined


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
        # Sent once, not with every slice.
        once = [ray.put(a.numpy()) if isinstance(a, Tensor) else ray.put(a) if isinstance(a, Bank) else a for a in arguments]
        answers = super().each("call", method, *once)
        yield from (_tensors(answer) for answer in answers)

    def spread(self, function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
        """A function of each item, on CPUs: in threads of tasks beside the actors, because each process imports for seconds."""
        return list(in_tasks("solve", partial(_alone, function), items, self._resources))

    def krylov(self, systems: list[LinearSystem], gradients: Tensor, steps: int) -> KrylovSpaces:
        """Krylov spaces of all systems together. If an actor is lost, new ones begin again, to the same end."""
        gradient_norms(gradients)  # raises ValueError here, before anything is sent
        asked = _Asked(systems, ray.put(gradients.numpy()), steps)
        found = self.whoever_is_lost(lambda: self._lanczos(asked))

        def combine(coefficients: Tensor) -> Tensor:
            def once() -> Tensor:
                nonlocal found
                if self.replaced != found.actors:
                    found = self._lanczos(asked)
                return as_tensor(ray.get(self.actors[0].combine.remote(coefficients.numpy()))).clone()

            return self.whoever_is_lost(once)

        return KrylovSpaces(combine, *found.small)

    def _lanczos(self, asked: "_Asked") -> "_Found":
        """Take all steps. The basis stays with the first actor."""
        first = self.actors[0]
        vectors = first.begin.remote(asked.gradients, asked.steps, len(self.actors) == 1)
        more = True
        while more:
            terms = self.terms("products", asked.systems, vectors)
            vectors, there_are_more = first.step.options(num_returns=2).remote(self.blocks, *terms)
            more = ray.get(there_are_more)
            self.progress.advance(1)
        return _Found([torch.tensor(part) for part in ray.get(first.found.remote())], self.replaced)


class _Asked(NamedTuple):
    systems: list[LinearSystem]
    gradients: Any  # a reference to [n, P]
    steps: int


class _Found(NamedTuple):
    small: list[Tensor]  # of `KrylovSpaces`, all but the combinations
    actors: int  # how often actors had been replaced: the basis went with them


class _Slices:
    """Actor: some slices of the sample; the first one takes the Lanczos steps. Tensors travel as arrays."""

    def __init__(self, shared: Shared, images: Any, texts: Any, slices: list[list[tuple[Tensor, ...]]]):
        self.device = device()
        sample: Sample = shared.sample._replace(images=as_tensor(images), texts=as_tensor(texts))
        self.slices = Slices(shared._replace(sample=sample), slices, self.device)
        self.lanczos: Lanczos | None = None
        self.kept: list[Tensor] = []  # products of the actor that takes the steps, in the order of its blocks
        self.alone = False

    def products(self, first: int, count: int, systems: list[LinearSystem], vectors: Any) -> tuple[Any, bool]:
        """`Slices.products`, see `SliceActors.terms`. The actor that takes the steps knows the vectors, and keeps its terms."""
        if self.lanczos is None:
            return _array(self.slices.products(first, count, systems, as_tensor(vectors).to(self.device))), True
        self.kept.append(self.slices.products(first, count, systems, self.lanczos.vectors))
        return np.empty(0), True

    def begin(self, gradients: Any, steps: int, alone: bool) -> Any:
        """Begin the spaces of some gradients [n, P]; returns the vectors that others, if there are any, multiply first."""
        self.lanczos, self.kept, self.alone = None, [], alone  # memory is for the next one
        self.lanczos = Lanczos(torch.tensor(gradients).to(self.device), steps)
        return self._vectors()

    def step(self, blocks: list[Block], *terms: NDArray[np.float32]) -> tuple[Any, bool]:
        """Take a step, given the terms of the products; returns the next vectors, and whether there is another step."""
        assert self.lanczos is not None
        own = iter(self.kept)
        moved = {b: as_tensor(term).to(self.device) if len(term) else next(own) for b, term in zip(blocks, terms, strict=True)}
        whole = Block(0, sum(block.size for block in blocks))
        more = self.lanczos.step(joined(whole, moved))
        self.kept = []
        return (self._vectors(), True) if more else (np.empty(0), False)

    def _vectors(self) -> Any:
        return np.empty(0) if self.alone or self.lanczos is None else _array(self.lanczos.vectors)

    def found(self) -> list[Any]:
        """All of the spaces but their bases, see `KrylovSpaces`."""
        assert self.lanczos is not None
        return [part.numpy() for part in self.lanczos.spaces()[1:]]

    def combine(self, coefficients: Any) -> Any:
        """See `KrylovSpaces`."""
        assert self.lanczos is not None
        return self.lanczos.combine(torch.tensor(coefficients)).cpu().numpy()

    def call(self, at: int, method: str, *arguments: Any) -> Any:
        """Call a method of `Slices`."""
        given = [as_tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
        answer = getattr(self.slices, method)(at, *given)
        return tuple(part.numpy() for part in answer) if isinstance(answer, tuple) else answer.numpy()


def _alone(function: Callable[[Item], Result], item: Item) -> Result:
    """Call a function with torch in one thread, as the driver is: sums must not depend on how many cores there are."""
    device()
    return function(item)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    """A tensor as an array in one piece, which Ray passes on without copies."""
    return tensor.cpu().contiguous().numpy()


def _tensors(answer: Any) -> Any:
    return tuple(map(as_tensor, answer)) if isinstance(answer, tuple) else as_tensor(answer)
