"""Stage `embed`: shards in, features out. The only stage that touches images: decode once, ask many questions."""

from typing import Any

from pipeline.console import say
from pipeline.errors import RunError
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Embed, Model
from pipeline.stages.embed.actor import EmbedPart
from pipeline.stages.embed.budget import Budget
from pipeline.stages.embed.finish import Finishers
from pipeline.stages.embed.oddities import Oddities
from pipeline.stages.embed.read import ReadParts
from pipeline.stages.embed.rows import Embedded, ToRead
from pipeline.stages.embed.usage import THREADS, Usage
from pipeline.workers import deadline, metrics
from pipeline.workers.cluster import Resources
from pipeline.workers.progress import Stage
from pipeline.workers.shards import as_tasks


def embed(
    datasets: list[Dataset], model: Model, limits: Embed, preprocess: dict[str, Any], resources: Resources
) -> float | None:
    """Embed every shard of some datasets that is not done yet.

    Reading tasks decode shards into parts. A pool of actors embeds each part and writes it. The accounting of a shard is
    written last, when all of its parts exist. In the end the accounting of all shards is written into one object too.
    After the deadline, see `workers.deadline`, the shards that are not done are left.

    Returns:
        Seconds that an actor spends in the model, a pair; None if nothing was done.

    Raises:
        RunError: a shard can't be read, more pairs are unusable than the budget allows, or counts do not add up.
    """
    budgets = [Budget(dataset, limits) for dataset in datasets]
    oddities = [Oddities(dataset) for dataset in datasets]
    todo, total = list[ToRead](), 0
    for i, dataset in enumerate(datasets):
        done = dataset.forget_changed()
        total += sum(shard.source.size for shard in dataset.shards)
        for accounting in done.values():
            oddities[i].note(accounting)
            budgets[i].spend(accounting)
        for shard in (shard for shard in dataset.shards if shard.name not in done):
            uids = dataset.uids_from(shard.name)
            todo.append(ToRead(i, shard.name, shard.source, dataset.reading, dataset.classes, uids))
    gpus = resources.device_type == "cuda"
    seconds, pairs, usage = 0.0, 0, Usage(gpus)
    with Stage("embed", total, total - sum(asked.source.size for asked in todo), "bytes") as progress:
        if not todo or deadline.passed():
            _settle(datasets, oddities, budgets)
            return None
        parts = (
            as_tasks([asked.to_row() for asked in todo])
            # On a GPU tokens would take the actors longer than the model. A CPU has more to do with the model.
            .flat_map(ReadParts(limits, preprocess, model if gpus else None), **resources.reader)
            .map_batches(
                EmbedPart,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_args=([d.features_folder("") for d in datasets], model, limits.precision),
                compute=resources.pool(len(todo), THREADS[resources.device_type]),
                **resources.actor,
            )
        )
        unfinished = {(asked.dataset, asked.shard) for asked in todo}
        shards = sum(len(dataset.shards) for dataset in datasets)
        waiting: dict[tuple[int, str], list[Embedded]] = {}
        with Finishers([dataset.places() for dataset in datasets], len(todo)) as finishers:

            def settle(wait: bool) -> None:
                """Count the shards that are finished."""
                for i, accounting in finishers.finished(wait):
                    datasets[i].remember(accounting)
                    if accounting.successes not in (None, accounting.pairs):
                        successes = f"{accounting.successes} successes in its _stats.json"
                        say(f"{accounting.shard}: {accounting.pairs} pairs in the tar, {successes}")
                    oddities[i].note(accounting)
                    budgets[i].spend(accounting)
                    unfinished.discard((i, accounting.shard))
                    metrics.quarantined(accounting.quarantined)
                    metrics.shards("embed", shards - len(unfinished), len(unfinished))

            for part in map(Embedded.from_row, parts.iter_rows()):
                pairs += part.pairs
                metrics.pairs("embed", part.pairs)
                metrics.model_seconds(part.busy.model, part.busy.readers, part.busy.storage)
                seconds += part.busy.model
                usage.add(part)
                progress.advance(part.size, f"{pairs} pairs")
                of_shard = waiting.setdefault((part.dataset, part.shard), [])
                of_shard.append(part)
                read = next((part.accounting for part in of_shard if part.accounting), None)
                if read and len(of_shard) == read.parts:
                    finishers.finish(part.dataset, read, waiting.pop((part.dataset, part.shard)))
                settle(wait=False)
                if deadline.passed():
                    say(f"embed    the deadline has passed: {len(unfinished)} of {shards} shards are left for the next night")
                    break
            settle(wait=True)
    if waiting and not deadline.passed():
        raise RunError(f"embed: shards ended without all of their parts: {sorted(waiting)[:5]}")
    usage.say()
    _settle(datasets, oddities, budgets)
    return seconds / max(1, pairs)


def _settle(datasets: list[Dataset], oddities: list[Oddities], budgets: list[Budget]) -> None:
    for dataset in datasets:
        dataset.compact()
    for of_dataset in oddities:
        of_dataset.settle()
    for budget in budgets:
        budget.settle()
