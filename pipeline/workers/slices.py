"""Actors that hold slices of a list. Actors that are lost are replaced.

Results are computed for each slice and summed over the slices in fixed order. So no number depends on how many actors there
are, or on how often one was lost.
"""

from collections.abc import Iterator
from typing import Any, Self

import ray
from ray.exceptions import ObjectLostError, RayActorError

from ecif.sample import sliced
from pipeline.console import say
from pipeline.workers.cluster import Resources, free_actors

MAX_REPLACEMENTS = 5


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
        self._actors: list[Any] = []
        self._replaced = 0
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
                    if getattr(error, "actor_init_failed", False) or self._replaced == MAX_REPLACEMENTS:
                        raise
                    self._replaced += 1
                    say("a worker process was lost: others take its share of the sample")
                    self._start()
                    pending[at:] = self._ask(method, arguments, at)
            yield answer

    def _ask(self, method: str, arguments: tuple[Any, ...], first: int) -> list[Any]:
        count = len(self._actors)
        places = ((self._actors[i % count], i // count) for i in range(first, len(self._slices)))
        return [getattr(actor, method).remote(at, *arguments) for actor, at in places]

    def _end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _start(self) -> None:
        self._end()
        count = min(free_actors(self._resources), len(self._slices))
        make: Any = ray.remote(**self._resources.actor)(self._worker)
        self._actors = [make.remote(*self._arguments, self._slices[i::count]) for i in range(count)]
