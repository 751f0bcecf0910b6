"""How far a run is, from what its folder lists: also while it goes on elsewhere. Nothing is written, Ray is not asked."""

import time
from collections.abc import Collection
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.run_folder.dataset import Dataset, in_folder
from pipeline.run_folder.started import Plan, read_plan
from pipeline.run_folder.tables import Accounting


class StageStatus(NamedTuple):
    """One stage of a run, from its objects and when they were written."""

    name: str
    done: int  # shards; for fit and solve the one object that they write
    total: int
    pairs: int | None = None  # done
    quarantined: int | None = None
    pairs_per_s: float | None = None  # since the run was started last, or the stage before it ended; None if nothing is new
    left_s: float | None = None  # at this rate; None where there is no rate
    last: float | None = None  # unix time of the object that was written last

    def cells(self) -> list[str]:
        """For a table with the columns of `HEADER`."""
        cells = [self.name, f"{self.done} of {self.total}", str(self.total - self.done)]
        cells += ["" if count is None else str(count) for count in (self.pairs, self.quarantined)]
        cells.append("" if self.pairs_per_s is None else f"{self.pairs_per_s:.3g}")
        return [*cells, *("" if s is None else duration(s) for s in (self.left_s, self.last and time.time() - self.last))]


HEADER = ["stage", "done", "left", "pairs", "quarantined", "pairs/s", "time left", "last written, ago"]


def status(folder: str) -> list[StageStatus]:
    """Every stage of the run that was started last in a folder.

    Raises:
        UserError: no run there, or its corpus is not where it was.
    """
    plan = read_plan(folder)
    found = []
    for i, (ids, datasets) in enumerate(zip(plan.checkpoints, plan.datasets(), strict=True)):
        stages = _checkpoint(plan, ids, datasets)
        found += [s._replace(name=f"{s.name}, checkpoint {i}") for s in stages] if len(plan.checkpoints) > 1 else stages
    return found


def duration(seconds: float) -> str:
    """Two units at most: 12 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    for unit, size, smaller, rest in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // rest} {smaller}"
    return f"{whole} s"


def _checkpoint(plan: Plan, ids: dict[str, Any], datasets: dict[str, Dataset]) -> list[StageStatus]:
    of = {name: dataset.accounting() for name, dataset in datasets.items()}
    embed = _embed(datasets, of, plan.started)
    kinds = {"fit": "heads", "solve": "directions"} | ({"filter": "filter"} if plan.config.filter else {})
    objects = {name: _tensors(plan, kind, ids) for name, kind in kinds.items()}
    stages = [
        StageStatus(name, int(item is not None), 1, last=item.modified if item else None) for name, item in objects.items()
    ]
    since = max(plan.started, *(item.modified if item else 0.0 for item in objects.values()))
    return [embed, *stages, _score(plan, ids, of["corpus"], len(datasets["corpus"].shards), since)]


def _embed(datasets: dict[str, Dataset], of: dict[str, dict[str, Accounting]], since: float) -> StageStatus:
    """The shards of the corpus and of all targets; time left is by bytes, of which shards have very different numbers."""
    written: dict[str, storage.Object] = {}
    done: dict[str, Accounting] = {}
    for name, dataset in datasets.items():
        done |= {f"{name}: {shard}": accounting for shard, accounting in of[name].items()}
        written |= {f"{name}: {shard}": item for shard, item in dataset.objects().items()}
    written = {shard: written[shard] for shard in done if shard in written}
    new, seconds = _since(written, since)
    size = sum(shard.source.size for dataset in datasets.values() for shard in dataset.shards)
    left = size - sum(a.size for a in done.values())
    fresh = sum(done[shard].size for shard in new)
    return StageStatus(
        "embed",
        len(done),
        sum(len(dataset.shards) for dataset in datasets.values()),
        sum(a.pairs for a in done.values()),
        sum(sum(a.quarantined.values()) for a in done.values()),
        sum(done[shard].pairs for shard in new) / seconds if seconds else None,
        left * seconds / fresh if fresh and left else None,
        _last(written),
    )


def _score(plan: Plan, ids: dict[str, Any], corpus: dict[str, Accounting], shards: int, since: float) -> StageStatus:
    pairs = {a.shard: a.embedded for a in corpus.values() if a.embedded}
    total = shards - (len(corpus) - len(pairs))  # a shard without a usable pair has no table
    if "scores" not in ids:
        return StageStatus("score", 0, total, 0)
    there = in_folder(storage.join(plan.config.run, "scores", ids["scores"]), ".parquet")
    written = {shard: there[shard] for shard in pairs if shard in there}
    new, seconds = _since(written, since)
    rate = sum(pairs[shard] for shard in new) / seconds if seconds else None
    scored = sum(pairs[shard] for shard in written)
    left = sum(pairs.values()) - scored
    return StageStatus("score", len(written), total, scored, None, rate, left / rate if rate and left else None, _last(written))


def _tensors(plan: Plan, kind: str, ids: dict[str, Any]) -> storage.Object | None:
    if kind not in ids:
        return None
    try:
        return storage.describe(storage.join(plan.config.run, kind, f"{ids[kind]}.safetensors"))
    except FileNotFoundError:
        return None


def _since(written: dict[str, storage.Object], since: float) -> tuple[Collection[str], float]:
    """Which objects are newer than a time, and in how many seconds they were written."""
    new = [shard for shard, item in written.items() if item.modified > since]
    return new, max((written[shard].modified - since for shard in new), default=0.0)


def _last(written: dict[str, storage.Object]) -> float | None:
    return max((item.modified for item in written.values()), default=None)
