"""Stage `embed`: shards in, features out. The only stage that touches images: decode once, ask many questions."""

import hashlib
import json
from collections import Counter
from typing import Any

import ray

from pipeline import storage
from pipeline.console import say
from pipeline.corpus.pairs import Quarantined
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Embed, Model
from pipeline.stages.embed.actor import EmbedPart
from pipeline.stages.embed.budget import Budget
from pipeline.stages.embed.oddities import Oddities
from pipeline.stages.embed.read import ReadParts
from pipeline.stages.embed.rows import Embedded, Refused, ToRead
from pipeline.stages.embed.usage import THREADS, Usage
from pipeline.workers.cluster import Resources
from pipeline.workers.progress import Stage
from pipeline.workers.shards import as_tasks


def embed(
    datasets: list[Dataset], model: Model, limits: Embed, preprocess: dict[str, Any], resources: Resources
) -> float | None:
    """Embed every shard of some datasets that is not done yet.

    Reading tasks decode shards into parts. A pool of actors embeds each part and writes it. The accounting of a shard is
    written last, when all of its parts exist.

    Returns:
        Seconds that an actor spends in the model, a pair; None if there was nothing to do.

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
    gpus = "num_gpus" in resources.actor
    seconds, pairs, usage = 0.0, 0, Usage(gpus)
    with Stage("embed", total, total - sum(asked.source.size for asked in todo)) as progress:
        if not todo:
            _settle(oddities, budgets)
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
                compute=ray.data.ActorPoolStrategy(
                    size=min(resources.workers, len(todo)),
                    max_tasks_in_flight_per_actor=THREADS + 1,
                    enable_true_multi_threading=True,
                ),
                max_concurrency=THREADS,
                **resources.actor,
            )
        )
        waiting: dict[tuple[int, str], list[Embedded]] = {}
        for part in map(Embedded.from_row, parts.iter_rows()):
            pairs += part.pairs
            seconds += part.busy.model
            usage.add(part)
            progress.advance(part.size, f"{pairs} pairs")
            of_shard = waiting.setdefault((part.dataset, part.shard), [])
            of_shard.append(part)
            finished = next((part.accounting for part in of_shard if part.accounting), None)
            if finished and len(of_shard) == finished.parts:
                parts_of_shard = waiting.pop((part.dataset, part.shard))
                accounting = finish_shard(datasets[part.dataset], finished, parts_of_shard)
                oddities[part.dataset].note(accounting)
                budgets[part.dataset].spend(accounting)
    if waiting:
        raise RunError(f"embed: shards ended without all of their parts: {sorted(waiting)[:5]}")
    usage.say()
    _settle(oddities, budgets)
    return seconds / max(1, pairs)


def _settle(oddities: list[Oddities], budgets: list[Budget]) -> None:
    for of_dataset in oddities:
        of_dataset.settle()
    for budget in budgets:
        budget.settle()


def finish_shard(dataset: Dataset, accounting: Accounting, parts: list[Embedded]) -> Accounting:
    """Finish a shard whose parts are all written: count its pairs, write its quarantine table, then its accounting.

    Args:
        dataset: the dataset of the shard.
        accounting: as its reader made it, without the counts of embedded and quarantined pairs.
        parts: every part of the shard, in any order.

    Raises:
        RunError: a pair or a member is not accounted for.
    """
    embedded = sum(part.pairs for part in parts)
    alone = [_set_aside(dataset, accounting)] if dataset.batched and embedded == 1 else []
    refused = sorted([*alone, *(r for part in parts for r in part.refused)], key=lambda r: (r.pair.index, r.pair.reason))
    reasons = dict(Counter[str](r.pair.reason for r in refused))
    listed = json.dumps([[r.pair.index, r.pair.reason] for r in refused])
    done = accounting._replace(
        embedded=embedded - len(alone),
        quarantined=reasons,
        unusable=hashlib.sha256(listed.encode()).hexdigest() if refused else "",
    )
    if done.pairs != done.embedded + len(refused):
        raise RunError(f"{done.shard}: {done.pairs} pairs, {done.embedded} embedded, {len(refused)} quarantined")
    if done.members != done.in_pairs + done.ignored:
        raise RunError(f"{done.shard}: {done.members} members, {done.in_pairs} in pairs, {done.ignored} ignored")
    if done.successes not in (None, done.pairs):
        say(f"{done.shard}: {done.pairs} pairs in the tar, {done.successes} successes in its _stats.json")
    url = dataset.quarantine_url(done.shard)
    if refused or storage.exists(url):  # a shard that was mended gets an empty table
        table = tables.quarantine_table(done.shard, [(r.stage, r.pair) for r in refused])
        storage.write_bytes(url, tables.parquet_bytes(table))
    names = {tables.part_name(i) for i in range(done.parts)}
    for part in dataset.parts(done.shard):  # a shard that was replaced before it was done may have left more parts
        if part.rpartition("/")[2] not in names:
            storage.delete(part)
    dataset.record(done)
    return done


def _set_aside(dataset: Dataset, accounting: Accounting) -> Refused:
    """Take the only usable pair of a shard out of its features: no other pair is there to contrast it with."""
    for i in range(accounting.parts):
        url = storage.join(dataset.features_folder(accounting.shard), tables.part_name(i))
        table = tables.read_table(url)
        if len(table):
            index, key, uid = (table[name][0].as_py() for name in ("index", "key", "uid"))
            storage.write_bytes(url, tables.parquet_bytes(table.slice(0, 0)))
            return Refused("embed", Quarantined(index, key, uid, "alone_in_shard", "no other pair to contrast it with"))
    raise RunError(f"{accounting.shard}: its only embedded pair is in none of its parts")
