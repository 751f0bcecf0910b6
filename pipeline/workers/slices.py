"""Actors that hold slices of a list. Actors that are lost are replaced.

Results are computed for each slice, or summed over slices in the order of `ecif.slices.halves`. So no number depends on how
many actors there are, or on how often one was lost.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import ray
from ray.exceptions import ObjectLostError, RayActorError
from torch import Tensor

from ecif.slices import Result, sliced
from pipeline.console import say
from pipeline.workers.cluster import Resources, free_actors

MAX_REPLACEMENTS = 5
UNEVEN = 1.25  # the most slices that an actor may hold, as a multiple of the mean


class Block(NamedTuple):
    """Consecutive slices whose sum is one term of the sum over all slices."""

    first: int
    size: int


class SliceActors:
    """A pool of actors, as the reducer sees it: a context that ends them, to free their CPUs or GPUs.

    Args:
        worker: an actor class. Its constructor takes `arguments`, then a list of slices; its methods take the position of a
            slice in that list, then what `each` is given.
        arguments: the first arguments of its constructor.
        items: the list that is cut into slices.
        resources: of the actors.
    """

    def __init__(self, worker: type, arguments: tuple[Any, ...], items: list[Any], resources: Resources):
        self._slices = sliced(items)
        self._worker, self._arguments, self._resources = worker, arguments, resources
        self.actors: list[Any] = []
        self.replaced = 0
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def each(self, method: str, *arguments: Any) -> Iterator[Any]:
        """Yield what a method returns for each slice, in order. If an actor is lost, new actors compute the rest."""
        pending = self._ask(method, arguments, 0)
        for at in range(len(self._slices)):
            while True:
                try:
                    answer = ray.get(pending[at])
                    break
                except (RayActorError, ObjectLostError) as error:
                    self._replace(error)
                    pending[at:] = self._ask(method, arguments, at)
            yield answer

    def terms(self, method: str, *arguments: Any) -> list[Any]:
        """References to what a method returns for each of `blocks`, once all are there. They stay where they are computed.

        Args:
            method: takes the position of a first slice and a number of slices, then `arguments`. It returns the sum over them,
                and True.
            arguments: of the method.

        Raises:
            RayActorError, ObjectLostError: an actor was lost.
        """
        found = [
            getattr(actor, method).options(num_returns=2).remote(at, block.size, *arguments)
            for block, (actor, at) in zip(self.blocks, self._places, strict=True)
        ]
        ray.get([there for _, there in found])
        return [term for term, _ in found]

    def whoever_is_lost(self, work: Callable[[], Result]) -> Result:
        """What some work with the actors returns. If an actor is lost, it is done again with new ones."""
        while True:
            try:
                return work()
            except (RayActorError, ObjectLostError) as error:
                self._replace(error)

    def _replace(self, error: RayActorError | ObjectLostError) -> None:
        if getattr(error, "actor_init_failed", False) or self.replaced == MAX_REPLACEMENTS:
            raise error
        self.replaced += 1
        say("a worker process was lost: others take its share of the sample")
        self._start()

    def _ask(self, method: str, arguments: tuple[Any, ...], first: int) -> list[Any]:
        places = (
            (actor, at + i) for block, (actor, at) in zip(self.blocks, self._places, strict=True) for i in range(block.size)
        )
        return [getattr(actor, method).remote(at, *arguments) for actor, at in list(places)[first:]]

    def _end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _start(self) -> None:
        self._end()
        count = min(free_actors(self._resources), len(self._slices))
        self.blocks = blocks(len(self._slices), count)
        held: list[list[Any]] = [[] for _ in range(count)]
        places = []
        for i, block in enumerate(self.blocks):
            places.append((i % count, len(held[i % count])))
            held[i % count] += self._slices[block.first : block.first + block.size]
        make: Any = ray.remote(**self._resources.actor)(self._worker)
        self.actors = [make.remote(*self._arguments, slices) for slices in held]
        self._places = [(self.actors[actor], at) for actor, at in places]  # of each block: its actor, and its place there


def blocks(slices: int, actors: int) -> list[Block]:
    """Cut the slices into few blocks that `actors` actors share about evenly: terms of the sum by halves, in order."""
    found = [Block(0, slices)]
    while len(found) < slices and -(-len(found) // actors) * actors > UNEVEN * len(found):
        found = [part for block in found for part in _split(block)]
    return found


def _split(block: Block) -> list[Block]:
    half = block.size // 2
    return [Block(block.first, half), Block(block.first + half, block.size - half)] if half else [block]


def joined(block: Block, terms: dict[Block, Tensor]) -> Tensor:
    """The sum over a block from the sums over parts of it."""
    if block in terms:
        return terms[block]
    first, second = _split(block)
    return joined(first, terms) + joined(second, terms)
