"""The end of a shard: its pairs are counted, its quarantine table is written, and last its accounting.

This takes three to five calls of the storage, one after the other. So shards are finished in threads beside the loop that
collects their parts, and many shards in threads of other processes.
"""

import contextvars
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import ray

from pipeline import storage
from pipeline.corpus.pairs import Quarantined
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder.dataset import Places
from pipeline.run_folder.tables import Accounting
from pipeline.stages.embed.rows import Embedded, Refused
from pipeline.storage.lease import Holder, held

FEW = 256  # shards that the driver's own threads finish in seconds, sooner than other processes start
SHARDS_A_PROCESS = 2_000  # of those that are left to embed
MOST_PROCESSES = 8
AT_ONCE = 8 * storage.THREADS  # shards that a process is given to finish


class Finished(NamedTuple):
    """A shard that is done."""

    dataset: int  # position among the datasets of the stage
    accounting: Accounting


class Finishers:
    """Context manager that finishes shards in threads.

    Args:
        places: of each dataset of the stage.
        shards: number of shards that are left to embed.
    """

    def __init__(self, places: list[Places], shards: int):
        self._places, self._pool, self._actors = places, ThreadPoolExecutor(storage.THREADS), list[Any]()
        self._given = deque[tuple[int, "Future[Accounting]"]]()
        self._count = 0
        if shards > FEW:
            how = {"num_cpus": 0, "max_concurrency": storage.THREADS, "max_restarts": -1, "max_task_retries": -1}
            make: Any = ray.remote(**how, scheduling_strategy="SPREAD")(FinishShards)
            count = min(MOST_PROCESSES, -(-shards // SHARDS_A_PROCESS))
            self._actors = [make.remote(places, held.get()) for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for actor in self._actors:
            ray.kill(actor)

    def finish(self, dataset: int, accounting: Accounting, parts: list[Embedded]) -> None:
        """Finish a shard beside the caller, see `finish_shard`."""
        storage.check_guard()
        self._count += 1
        if self._actors:
            actor = self._actors[self._count % len(self._actors)]
            future = actor.finish.remote(dataset, accounting, parts).future()
        else:  # a thread with the guard of this one
            mine: Callable[..., Any] = contextvars.copy_context().run
            future = self._pool.submit(mine, finish_shard, self._places[dataset], accounting, parts)
        self._given.append((dataset, future))

    def finished(self, wait: bool = False) -> Iterator[Finished]:
        """The shards that are done since the last call, in the order in which they were given.

        Args:
            wait: for all shards; without it, only as long as too many are being finished.

        Raises:
            RunError: see `finish_shard`.
        """
        most = AT_ONCE * max(1, len(self._actors))
        while self._given and (wait or len(self._given) > most or self._given[0][1].done()):
            dataset, future = self._given.popleft()
            yield Finished(dataset, future.result())


class FinishShards:
    """Actor: finishes shards in threads. They wait for storage most of the time, so it claims no core.

    Args:
        places: of each dataset of the stage.
        holder: who has to hold the run folder; None if nobody has to.
    """

    def __init__(self, places: list[Places], holder: Holder | None):
        self.places, self.holder = places, holder

    def finish(self, dataset: int, accounting: Accounting, parts: list[Embedded]) -> Accounting:
        """Finish a shard, see `finish_shard`.

        Raises:
            RunError: another run has taken over the folder.
        """
        if self.holder is not None:
            self.holder.check()
        return finish_shard(self.places[dataset], accounting, parts)


def finish_shard(places: Places, accounting: Accounting, parts: list[Embedded]) -> Accounting:
    """Finish a shard whose parts are all written: count its pairs, write its quarantine table, then its accounting.

    Args:
        places: of the shard's dataset.
        accounting: as its reader made it, without the counts of embedded and quarantined pairs.
        parts: every part of the shard, in any order.

    Raises:
        RunError: a pair or a member is not accounted for.
    """
    embedded = sum(part.pairs for part in parts)
    alone = [_set_aside(places, accounting)] if places.batched and embedded == 1 else []
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
    url = places.quarantine_url(done.shard)
    if refused or storage.exists(url):  # a shard that was mended gets an empty table
        table = tables.quarantine_table(done.shard, [(r.stage, r.pair) for r in refused])
        storage.write_bytes(url, tables.parquet_bytes(table))
    names = {tables.part_name(i) for i in range(done.parts)}
    for part in places.parts(done.shard):  # a shard that was replaced before it was done may have left more parts
        if part.rpartition("/")[2] not in names:
            storage.delete(part)
    places.write_accounting(done)
    return done


def _set_aside(places: Places, accounting: Accounting) -> Refused:
    """Take the only usable pair of a shard out of its features: no other pair is there to contrast it with."""
    for i in range(accounting.parts):
        url = storage.join(places.features_folder(accounting.shard), tables.part_name(i))
        table = tables.read_table(url)
        if len(table):
            index, key, uid = (table[name][0].as_py() for name in ("index", "key", "uid"))
            storage.write_bytes(url, tables.parquet_bytes(table.slice(0, 0)))
            return Refused("embed", Quarantined(index, key, uid, "alone_in_shard", "no other pair to contrast it with"))
    raise RunError(f"{accounting.shard}: its only embedded pair is in none of its parts")
