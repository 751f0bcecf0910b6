"""How far a run is, from a listing of its folder. The run may go on elsewhere. Nothing is written and Ray is not asked."""

import time
from collections.abc import Collection
from typing import NamedTuple

from pipeline import storage
from pipeline.run_folder.artifacts import Artifacts, each_shard, stages_of
from pipeline.run_folder.changes import changes_since, sources_of
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.generations import Generation, Generations
from pipeline.run_folder.reference import reference_from
from pipeline.run_folder.started import Started, read_started
from pipeline.run_folder.tables import Accounting
from pipeline.stages.publish import Publication


class StageStatus(NamedTuple):
    """One stage of a run, from its objects and when they were written."""

    name: str
    done: int  # number of shards, or of objects if the stage does not go shard by shard
    total: int
    pairs: int | None = None  # done
    quarantined: int | None = None
    pairs_per_s: float | None = None  # since the start, or the end of the stage before; None if nothing is new
    left_s: float | None = None  # at this rate; None without a rate
    last: float | None = None  # unix time of the object that was written last

    def cells(self) -> list[str]:
        """Cells of a table row, in the columns of `HEADER`."""
        cells = [self.name, f"{self.done} of {self.total}", str(self.total - self.done)]
        cells += ["" if count is None else str(count) for count in (self.pairs, self.quarantined)]
        cells.append("" if self.pairs_per_s is None else f"{self.pairs_per_s:.3g}")
        return [*cells, *("" if s is None else duration(s) for s in (self.left_s, self.last and time.time() - self.last))]


HEADER = ["stage", "done", "left", "pairs", "quarantined", "pairs/s", "time left", "last written, ago"]


def status(folder: str) -> list[StageStatus]:
    """Every stage that was asked for, of the run that was started last in a folder.

    Raises:
        UserError: no run there, or its corpus is not where it was.
    """
    started = read_started(folder)
    each, found = started.datasets(), []
    generation = Generations(folder).last()
    reference = reference_from(generation.record["reference"]).checkpoints if generation else []
    known = reference if len(reference) == len(each) else [None] * len(each)
    artifacts = [started.artifacts(datasets, learned) for datasets, learned in zip(each, known, strict=True)]
    for i, (datasets, there) in enumerate(zip(each, artifacts, strict=True)):
        stages = _checkpoint(started, datasets, there)
        found += [s._replace(name=f"{s.name}, checkpoint {i}") for s in stages] if len(each) > 1 else stages
    if generation:
        return [*found, _last(generation, each[0]["corpus"])]
    return [*found, _publish(started, each[0]["corpus"], [one for one in artifacts if one])]


def duration(seconds: float) -> str:
    """Two units at most: 12 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    for unit, size, smaller, rest in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // rest} {smaller}"
    return f"{whole} s"


def _checkpoint(started: Started, datasets: dict[str, Dataset], artifacts: Artifacts | None) -> list[StageStatus]:
    of = {name: dataset.accounting() for name, dataset in datasets.items()}
    stages, since = [_embed(datasets, of, started.time)], started.time
    corpus = _Corpus.of(datasets["corpus"])
    for name, keys in stages_of(started.config).items():
        if any(map(each_shard, keys)):
            stage = _of_shards(name, keys, artifacts, corpus, since)
        else:
            stage = _of_objects(name, keys, artifacts)
        stages.append(stage)
        since = max(since, stage.last or 0.0)
    return stages


class _Corpus(NamedTuple):
    """The shards that tables are written for."""

    pairs: dict[str, int]  # usable pairs of each shard that has some
    shards: int  # number of shards that have or will have a table; one without a usable pair has none

    @classmethod
    def of(cls, dataset: Dataset) -> "_Corpus":
        done = dataset.accounting()
        pairs = {shard: a.embedded for shard, a in done.items() if a.embedded}
        return cls(pairs, len(dataset.shards) - (len(done) - len(pairs)))


def _of_objects(name: str, keys: list[str], artifacts: Artifacts | None) -> StageStatus:
    """A stage that does not go shard by shard."""
    written = {key: item for key in keys if artifacts and (item := storage.described(artifacts.url(key)))}
    return StageStatus(name, len(written), len(keys), last=_newest(written))


def _of_shards(name: str, keys: list[str], artifacts: Artifacts | None, corpus: _Corpus, since: float) -> StageStatus:
    """A stage that goes shard by shard. A shard is done when all its tables exist; other objects are not counted."""
    if artifacts is None:
        return StageStatus(name, 0, corpus.shards, 0)
    listed = [artifacts.listed(key) for key in filter(each_shard, keys)]
    whole = {shard: [of[shard] for of in listed] for shard in corpus.pairs if all(shard in of for of in listed)}
    last = {shard: max(items, key=lambda item: item.modified) for shard, items in whole.items()}
    return _rated(StageStatus(name, len(whole), corpus.shards, 0), last, corpus, since)


def _last(generation: Generation, dataset: Dataset) -> StageStatus:
    """The last generation: how many of the corpus's shards it has as they are now."""
    corpus, changes = _Corpus.of(dataset), changes_since(generation, sources_of(dataset))
    done = [shard for shard in changes.same if shard in generation.files]
    pairs = sum(generation.files[shard].rows for shard in done)
    return StageStatus(f"generation {generation.number}", len(done), corpus.shards, pairs, last=generation.time)


def _publish(started: Started, dataset: Dataset, artifacts: list[Artifacts]) -> StageStatus:
    """The stage that writes the folder of the newest columns."""
    corpus = _Corpus.of(dataset)
    if len(artifacts) < len(started.checkpoints):
        return StageStatus("publish", 0, corpus.shards, 0)
    publication = Publication(started.config, artifacts, dataset.sidecars)
    there = publication.written()
    written = {s: there.listed[s] for s in corpus.pairs if there.current.get(s) == publication.of_shard(s)}
    return _rated(StageStatus("publish", len(written), corpus.shards, 0), written, corpus, started.time)


def _rated(stage: StageStatus, written: dict[str, storage.Object], corpus: _Corpus, since: float) -> StageStatus:
    """A stage with the number of pairs written, the rate, and the time left."""
    new, seconds = _since(written, since)
    rate = sum(corpus.pairs[shard] for shard in new) / seconds if seconds else None
    done = sum(corpus.pairs[shard] for shard in written)
    left = sum(corpus.pairs.values()) - done
    return stage._replace(pairs=done, pairs_per_s=rate, left_s=left / rate if rate and left else None, last=_newest(written))


def _embed(datasets: dict[str, Dataset], of: dict[str, dict[str, Accounting]], since: float) -> StageStatus:
    """The shards of the corpus and of all targets. Time left is estimated by bytes, because shards differ much in size."""
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
        _newest(written),
    )


def _since(written: dict[str, storage.Object], since: float) -> tuple[Collection[str], float]:
    """The objects that are newer than a time, and the seconds from that time to the newest of them."""
    new = [shard for shard, item in written.items() if item.modified > since]
    return new, max((written[shard].modified - since for shard in new), default=0.0)


def _newest(written: dict[str, storage.Object]) -> float | None:
    return max((item.modified for item in written.values()), default=None)
