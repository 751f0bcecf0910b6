"""Stage `publish`: one table of columns for each shard, in the folder that always holds the newest columns.

Misalignment and the filters are functions of a pair's other columns, so they are computed here. If the model has several
checkpoints, each of them scores the pairs with its own features, heads and directions. The table holds the mean over the
checkpoints. The mean of `influence_*` is the mean of the predicted changes of the target's loss.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.columns.misalignment import Misalignment
from ecif.copies import COPIES
from ecif.filter_choice import ChosenFilter
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus import sidecar
from pipeline.errors import RunError
from pipeline.run_folder import compacted, tables, tensors
from pipeline.run_folder.artifacts import Artifacts, fingerprint
from pipeline.run_folder.columns import IDENTITY, columns, evidence_scores, requested_columns
from pipeline.run_folder.dataset import Dataset, in_folder
from pipeline.run_folder.finished import LATEST
from pipeline.run_folder.generations import COLUMNS, TABLE, File, file_path
from pipeline.workers import metrics
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage
from pipeline.workers.shards import in_tasks


class Publication(NamedTuple):
    """Everything that the published columns depend on."""

    config: Config
    checkpoints: list[Artifacts]
    sidecars: sidecar.Sidecars | None
    sources: dict[str, str] | None = None  # of a generation: what each shard was read from, part of its file's name

    @property
    def run(self) -> str:
        """Fingerprint of what the columns of all shards depend on."""
        carried = [str(self.sidecars.schema)] if self.sources is not None and self.sidecars else []
        return fingerprint([*(artifacts.names["scores"] for artifacts in self.checkpoints), *carried])

    def of_shard(self, shard: str) -> str:
        """Fingerprint of what the columns of one shard depend on beside that."""
        beside = self.sidecars.found.get(shard) if self.sidecars and self.config.corpus.sidecar else None
        return fingerprint(
            [artifacts.shards[shard] for artifacts in self.checkpoints], [beside.size, beside.etag] if beside else None
        )

    def id(self) -> str:
        """Fingerprint of all columns of all shards."""
        return fingerprint(self.run, {shard: self.of_shard(shard) for shard in self.checkpoints[0].shards})

    def url(self, shard: str) -> str:
        """URL of a shard's table."""
        if self.sources is not None:
            return storage.join(self.config.run, TABLE, self.path(shard))
        return storage.join(self.config.run, LATEST, f"{shard}.parquet")

    def path(self, shard: str) -> str:
        """Of a generation: path of a shard's table in it."""
        return file_path(self.run, shard, (self.sources or {})[shard])

    def compacted_url(self) -> str:
        """What the tables of all shards say they are of, in one object, see `run_folder.compacted`."""
        return storage.join(self.config.run, "accounting", f"{LATEST}.parquet")

    def listed(self) -> dict[str, storage.Object]:
        """The tables in the folder, by shard."""
        return in_folder(storage.join(self.config.run, LATEST), ".parquet")

    def written(self) -> "Written":
        """What the tables in the folder say they are of."""
        listed = self.listed()
        said = compacted.read(self.compacted_url(), listed, lambda item: " ".join(tables.read_run(item.url)))
        current = {shard: text.partition(" ") for shard, text in said.texts.items()}
        return Written(listed, said, {shard: of_shard for shard, (run, _, of_shard) in current.items() if run == self.run})


class Written(NamedTuple):
    """The published tables that are there."""

    listed: dict[str, storage.Object]  # by shard
    said: compacted.Said  # the fingerprints of the run and of the shard, of every table
    current: dict[str, str]  # the fingerprint of the shard, of every table of this run


def publish(publication: Publication, corpus: Dataset, resources: Resources) -> set[str]:
    """Write every table that is missing or out of date, and remove the tables of shards that are gone.

    Returns:
        The shards that have a table in the end.

    Raises:
        RunError: the checkpoints scored different pairs of a shard: a pair may give `non_finite_features` under one of them and
            not under the others.
    """
    pairs = {shard: a.embedded for shard, a in corpus.accounting().items() if a.embedded}
    _expect_the_same(publication, pairs)
    written = publication.written()
    todo = [shard for shard in pairs if written.current.get(shard) != publication.of_shard(shard)]
    for shard in written.listed.keys() - pairs.keys():
        storage.delete(publication.url(shard))
    _write(publication, pairs, todo, resources)
    listed = publication.listed() if todo else {shard: written.listed[shard] for shard in pairs}
    if todo or not written.said.complete:
        texts = {shard: written.said.texts[shard] for shard in pairs if shard in written.said.texts}
        texts |= {shard: f"{publication.run} {publication.of_shard(shard)}" for shard in todo}
        compacted.write(publication.compacted_url(), listed, texts)
    return set(listed)


def publish_files(publication: Publication, pairs: dict[str, int], resources: Resources) -> dict[str, File]:
    """Write the tables of a generation that are not there yet.

    Args:
        publication: with `sources`.
        pairs: number of usable pairs of each shard to write.
        resources: of the tasks.

    Returns:
        The file of each shard.

    Raises:
        RunError: see `publish`.
    """
    _expect_the_same(publication, pairs)
    there = _described(publication, list(pairs))
    todo = [shard for shard in pairs if shard not in there]
    _write(publication, pairs, todo, resources)
    there |= _described(publication, todo)
    return {shard: File(publication.path(shard), there[shard].size, count) for shard, count in pairs.items()}


def _expect_the_same(publication: Publication, pairs: dict[str, int]) -> None:
    """Raise RunError if a checkpoint has usable pairs in other shards than these."""
    if any(artifacts.shards.keys() != pairs.keys() for artifacts in publication.checkpoints):
        raise RunError("the checkpoints scored different pairs; see the quarantine tables of each")


def _described(publication: Publication, shards: list[str]) -> dict[str, storage.Object]:
    """Those tables of a generation that exist."""
    if not publication.checkpoints[0].part:
        folder = storage.join(publication.config.run, TABLE, COLUMNS, publication.run)
        there = {item.url.rpartition(f"/{publication.run}/")[2]: item for item in storage.listing(folder, ".parquet")}
        names = {shard: publication.path(shard).split("/", 2)[2] for shard in shards}
        return {shard: there[name] for shard, name in names.items() if name in there}
    found = storage.in_threads(storage.described, map(publication.url, shards))
    return {shard: item for shard, item in zip(shards, found, strict=True) if item}


def _write(publication: Publication, pairs: dict[str, int], todo: list[str], resources: Resources) -> None:
    total = sum(pairs.values())
    with Stage("publish", total, total - sum(pairs[shard] for shard in todo), "pairs") as progress:
        same = in_tasks("publish", PublishShard(publication), todo, resources) if todo else []
        for number, (shard, scored_the_same) in enumerate(zip(todo, same, strict=True), 1):
            if not scored_the_same:
                raise RunError(f"{shard}: the checkpoints scored different pairs; see the quarantine tables of each")
            progress.advance(pairs[shard])
            left = len(todo) - number
            metrics.shards("publish", len(pairs) - left, left)


class PublishShard:
    """Writes the table of a shard as one Parquet object."""

    def __init__(self, publication: Publication):
        self.publication, self.columns = publication, columns(publication.config)
        self.of_checkpoints = [_OfCheckpoint(publication.config, artifacts) for artifacts in publication.checkpoints]

    def __call__(self, shard: str) -> bool:
        """Write the columns of one shard; False if the checkpoints scored different pairs of it."""
        device()  # sums in one thread
        publication = self.publication
        each = [of_checkpoint(shard) for of_checkpoint in self.of_checkpoints]
        first = each[0][0]
        # Folds are those of the copies that a checkpoint sees, so they may differ; the first one's are published.
        if any(not first.drop_columns("fold").equals(identity.drop_columns("fold")) for identity, _ in each):
            return False
        means = {column.name: _mean([scores[column.name] for _, scores in each]) for column in self.columns}
        table = tables.scores_table({name: first[name] for name in first.column_names}, means)
        if publication.sidecars:
            for name, column in sidecar.columns(publication.sidecars, shard, first["key"].to_pylist()).items():
                table = table.append_column(name, column)
        table = tables.described(table, self.columns, publication.run, publication.of_shard(shard))
        storage.write_bytes(publication.url(shard), tables.parquet_bytes(table))
        return True


class _OfCheckpoint:
    """The columns of a shard, computed with one checkpoint."""

    def __init__(self, config: Config, artifacts: Artifacts):
        self.config, self.artifacts = config, artifacts
        self.misalignment = tensors.load(artifacts.url("misalignment"), Misalignment)
        targets = config.targets if config.filter else []
        self.filters = {name: tensors.load(artifacts.url(f"filter/{name}"), ChosenFilter) for name in targets}

    def __call__(self, shard: str) -> tuple[pa.Table, dict[str, Tensor]]:
        """Identities and scores of a shard's pairs."""
        config = self.config
        pairs = self._table("pairs", shard)
        scores = {kind.name: _column(pairs, kind.name) for kind in evidence_scores(config)}
        evidence = torch.stack(list(scores.values()), 1)
        moved = {name: self._parts(f"influence/{name}", shard) for name in config.targets}
        # Misalignment and filters were learned from the heads' first-order influence on the sample, so they take the same here.
        learned = {name: (of["positive"] + of["negative"], of["agreement"]) for name, of in moved.items()}
        together = torch.cat([evidence, torch.stack([one for of in learned.values() for one in of], 1)], 1)
        scores |= {f"{column}_{name}": of[column] for name, of in moved.items() for column in ("agreement", "near")}
        scores |= {column.name: _column(pairs, column.name) for column in COPIES}
        scores["misalignment"] = self.misalignment.probability(together).float()
        for name, chosen in self.filters.items():
            scores[f"filter_{name}"] = chosen.scores(evidence, *learned[name])
        if config.score.order == 2:
            corrections = {name: self._parts(f"correction/{name}", shard) for name in config.targets}
            scores["leverage"] = torch.stack([parts["leverage"] for parts in corrections.values()]).amax(0)
            moved = {n: {p: moved[n][p] + corrections[n][p] for p in ("positive", "negative")} for n in moved}
        if config.scoring.mode == "forward":
            moved = {name: self._parts(f"forward_influence/{name}", shard) for name in config.targets}
        for name, parts in moved.items():
            scores[f"influence_positive_{name}"], scores[f"influence_negative_{name}"] = parts["positive"], parts["negative"]
            scores[f"influence_{name}"] = parts["positive"] + parts["negative"]
        for column in requested_columns(config):
            scores[column.name] = self._parts(f"column/{column.name}", shard)[column.name]
        return pairs.select(list(IDENTITY)), scores

    def _table(self, key: str, shard: str) -> pa.Table:
        return tables.read_table(self.artifacts.table(key, shard))

    def _parts(self, key: str, shard: str) -> dict[str, Tensor]:
        table = self._table(key, shard)
        return {name: _column(table, name) for name in table.column_names if name != "index"}


def _column(table: pa.Table, name: str) -> Tensor:
    return torch.tensor(table[name].to_numpy())


def _mean(of_checkpoints: list[Tensor]) -> NDArray[np.float32]:
    """[N] mean of a column over the checkpoints."""
    if len(of_checkpoints) == 1:
        return of_checkpoints[0].numpy()
    return torch.stack(of_checkpoints).double().mean(0).float().numpy()
