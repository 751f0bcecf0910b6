"""A pool of actors over the shards of a corpus: each shard's table is a pure function of the shard, written as one object."""

from typing import Any

import ray

from pipeline import storage
from pipeline.run_folder.dataset import Dataset
from pipeline.workers.cluster import Resources
from pipeline.workers.progress import Stage

MOST_TASKS = 10_000  # each takes Ray milliseconds and kilobytes in the driver before the first one starts


def as_tasks(rows: list[dict[str, Any]]) -> ray.data.Dataset:
    """Rows for Ray Data, a task each; where there are very many, a few consecutive ones share a task."""
    return ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_TASKS))


def over_shards(
    name: str, folder: str, dataset: Dataset, worker: type, arguments: tuple[Any, ...], resources: Resources
) -> list[dict[str, Any]]:
    """Have every shard worked on whose table is not below `folder` yet.

    Args:
        name: of the stage.
        folder: of the tables.
        dataset: the corpus's features.
        worker: an actor class; called with a row {"shard", "parts"}, it writes `<folder>/<shard>.parquet` last of all and
            returns a row with at least "pairs".
        arguments: of its constructor.
        resources: of the actors.

    Returns:
        What the calls returned, in no particular order; nothing where all is done.
    """
    done = dataset.accounting()
    there = written_shards(folder)
    todo = [a for a in done.values() if a.embedded and a.shard not in there]
    total = sum(a.embedded for a in done.values())
    results: list[dict[str, Any]] = []
    with Stage(name, total, total - sum(a.embedded for a in todo)) as progress:
        if not todo:
            return results
        rows = [{"shard": a.shard, "parts": a.parts} for a in todo]
        shards = as_tasks(rows).map(
            worker,
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(size=min(resources.workers, len(todo))),
            **resources.actor,
        )
        for row in shards.iter_rows():
            progress.advance(row["pairs"])
            results.append(row)
    return results


def written_shards(folder: str) -> set[str]:
    """Names of the shards whose tables are written below `folder`."""
    return {
        item.url.partition(f"/{folder.rsplit('/', 1)[-1]}/")[2].removesuffix(".parquet")
        for item in storage.listing(folder, ".parquet")
    }
