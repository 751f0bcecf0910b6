"""Run a pool of actors over the shards of a corpus. Each shard's tables are a pure function of the shard, one object each."""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import ray

from pipeline import storage
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.tables import Accounting
from pipeline.workers import deadline, metrics
from pipeline.workers.cluster import Resources
from pipeline.workers.progress import Stage

MOST_TASKS = 10_000  # each costs the driver milliseconds and kilobytes before the first one starts
Item = TypeVar("Item")
Result = TypeVar("Result")


class ShardWorker:
    """What `over_shards` runs: an actor that is called with a row {"shard", "parts", "keys"}, the last as JSON.

    It writes the shard's table of each key and returns a row with at least "pairs".
    """

    threads = 1  # that call it at once where it is on a GPU


def as_tasks(rows: list[dict[str, Any]]) -> ray.data.Dataset:
    """Rows for Ray Data, with a task for each row. Above MOST_TASKS rows, a few consecutive ones share a task."""
    return ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_TASKS))


def titled(worker: type, stage: str) -> type:
    """An actor class under the name of its stage, which Ray's dashboard, metrics and process titles then show: `Map(score)`."""
    return type(stage, (worker,), {"__module__": worker.__module__})


def in_tasks(
    name: str, function: Callable[[Item], Result], items: list[Item], resources: Resources, together: int = storage.THREADS
) -> Iterator[Result]:
    """`map` over the cluster, for work that mostly reads.

    Args:
        name: of the stage, for Ray's dashboard.
        function: of one item. It is sent to the workers once.
        items: in any number.
        resources: of the tasks.
        together: the most consecutive items that a task works on, in threads; more if there would be more than MOST_TASKS
            tasks, fewer if not every worker would have a task.

    Returns:
        The results, in the order of the items.
    """
    size = max(1, min(together, -(-len(items) // resources.workers)), -(-len(items) // MOST_TASKS))
    task: Any = ray.remote(**resources.reader, max_retries=2)(_in_threads).options(name=name)
    shared = ray.put(function)
    results = [task.remote(shared, items[i : i + size]) for i in range(0, len(items), size)]
    for result in results:
        yield from ray.get(result)


def _in_threads(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return list(storage.in_threads(function, items))


def missing_tables(artifacts: Artifacts, keys: list[str]) -> dict[str, list[str]]:
    """For each shard that lacks tables, the keys of those tables."""
    missing: dict[str, list[str]] = {}
    for key in keys:
        for shard in sorted(artifacts.shards.keys() - artifacts.listed(key).keys()):
            missing.setdefault(shard, []).append(key)
    return missing


def over_shards(
    name: str,
    done: dict[str, Accounting],
    missing: dict[str, list[str]],
    worker: type[ShardWorker],
    arguments: tuple[Any, ...],
    resources: Resources,
) -> list[dict[str, Any]]:
    """Run actors over every shard that lacks tables.

    Args:
        name: of the stage.
        done: accounting of the corpus's shards.
        missing: see `missing_tables`.
        worker: the class of the actors.
        arguments: of its constructor.
        resources: of the actors.

    Returns:
        The rows that the calls returned, in no particular order. Empty if no table was missing; not all if it is late, see
        `workers.deadline`.
    """
    total = sum(a.embedded for a in done.values())
    results: list[dict[str, Any]] = []
    with Stage(name, total, total - sum(done[shard].embedded for shard in missing), "pairs") as progress:
        if not missing or deadline.passed():
            return results
        rows = [{"shard": s, "parts": done[s].parts, "keys": json.dumps(missing[s])} for s in done if s in missing]
        shards = as_tasks(rows).map(
            titled(worker, name),
            fn_constructor_args=arguments,
            compute=resources.pool(len(rows), worker.threads if resources.device_type == "cuda" else 1),
            **resources.actor,
        )
        for row in shards.iter_rows():
            progress.advance(row["pairs"])
            results.append(row)
            left = len(rows) - len(results)
            metrics.shards(name, len(done) - left, left)
            if deadline.passed():
                break
    return results


def seconds_a_pair(rows: list[dict[str, Any]]) -> float | None:
    """Seconds of computation a pair, from rows with "seconds" and "pairs"; None if there are no rows."""
    return sum(row["seconds"] for row in rows) / sum(row["pairs"] for row in rows) if rows else None
