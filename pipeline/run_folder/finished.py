"""A finished run: its record (run.json) and its columns."""

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from ecif import __version__
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.exact_copies import ExactCopies
from pipeline.corpus.uids import Uids
from pipeline.errors import RunError, UserError
from pipeline.run_folder import tables
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.columns import IDENTITY
from pipeline.run_folder.dataset import in_folder
from pipeline.run_folder.generations import TABLE, Generations

LATEST = "latest"  # folder of the columns of the run that finished last
AHEAD = 2 * storage.THREADS  # shards whose columns are read ahead of the one that is worked on


class Checkpoint(NamedTuple):
    """The record of one checkpoint of the model."""

    features: str  # fingerprint of the corpus's features
    names: dict[str, str]  # see `run_folder.artifacts.names`
    fit: dict[str, Any]  # how the heads were fitted: what was chosen, what was tried, and what each lost on held-out pairs
    targets: dict[str, Any]  # by target: the damping, its agreement with refits, coverage, residual, the chosen filter

    def artifacts(self, folder: str) -> Artifacts:
        """Where its objects are. The content of shards, which names of tables need, is left out."""
        return Artifacts(folder, self.names, {})


class Finished(NamedTuple):
    """The run that finished last in a folder."""

    folder: str
    config: Config
    id: str  # fingerprint of everything that its columns are a function of
    checkpoints: list[Checkpoint]
    uids: Uids = Uids()  # of the scored pairs
    exact_copies: ExactCopies = ExactCopies()
    generation: int | None = None  # its number, of one that a night made
    files: dict[str, storage.Object] = {}  # ... and its columns, by shard

    @property
    def table(self) -> str:
        """Folder of the columns: of one Parquet file for each shard, or the Delta table of the generations."""
        return storage.join(self.folder, LATEST if self.generation is None else TABLE)

    def url(self, shard: str) -> str:
        """Where the columns of a shard are; or where they would be, for a shard without usable pairs."""
        return self.files[shard].url if shard in self.files else storage.join(self.table, f"{shard}.parquet")

    def facts(self) -> dict[str, Any]:
        """The record of the run, in plain values; see `finished_from`."""
        return {
            "version": __version__,
            "config": self.config.model_dump(mode="json"),
            "id": self.id,
            "checkpoints": [_finite(one._asdict()) for one in self.checkpoints],
            "uids": self.uids._asdict(),
            "exact_copies": self.exact_copies._asdict(),
        }

    def scores(self, columns: list[str] | None = None) -> pa.Table:
        """The columns of every pair, shard after shard in the order of their names.

        Args:
            columns: names of columns; all by default.

        Raises:
            UserError: a column does not exist, or the folder holds no table.
            RunError: the tables are of two runs, because another run is replacing them.
        """
        return pa.concat_tables((part for _, part in self.of_shards(columns)), promote_options="permissive")

    def schema(self) -> pa.Schema:
        """The names and types of the columns, and what each means. Raises UserError if the folder holds no table."""
        return storage.read_schema(next(iter(self._listed().values())).url)

    def _listed(self) -> dict[str, storage.Object]:
        listed = in_folder(self.table, ".parquet") if self.generation is None else self.files
        if not listed:
            raise UserError(f"{self.table} holds no columns: the same `ecif run` writes them")
        return listed

    def of_shards(self, columns: list[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
        """`scores` as one table for each shard, with the shard's name. They never are in memory together."""
        listed = self._listed()
        schema = storage.read_schema(next(iter(listed.values())).url)
        for column in columns or []:
            if column not in schema.names:
                known = ", ".join(name for name in schema.names if name not in IDENTITY)
                raise UserError(f"no column {column!r} in {self.table}: there are {known}")

        def read(item: storage.Object) -> pa.Table:
            return storage.parse_table(storage.read_bytes(item.url), columns)

        for shard, part in zip(listed, storage.in_threads(read, listed.values(), AHEAD), strict=True):
            if tables.run_of(part.schema)[0] != tables.run_of(schema)[0]:
                raise RunError(f"{self.table}: columns of two runs; wait until the run that writes them has finished")
            yield shard, part


def open_run(folder: str, generation: int | None = None) -> Finished:
    """The run that finished last in a folder. Where nights have written generations, it is the last one of these.

    Args:
        folder: of the run.
        generation: the number of an earlier one.

    Raises:
        UserError: no finished run there, or one of another version, or no such generation.
    """
    generations = Generations(folder)
    if generation is not None or generations.exist():
        found = generations.at(generation)
        files = {shard: storage.Object(generations.url(file), file.size, "") for shard, file in found.files.items()}
        return finished_from(folder, found.record["run"], generations.root)._replace(files=files, generation=found.number)
    url = storage.join(folder, "run.json")
    try:
        facts = json.loads(storage.read_bytes(url))
    except FileNotFoundError:
        raise UserError(f"{folder}: no finished run there (no run.json)") from None
    except ValueError:
        raise UserError(f"{url} is not JSON: `ecif run` writes it anew") from None
    return finished_from(folder, facts, url)


def open_generation(folder: str, generation: int | None = None, since: int | None = None) -> Finished:
    """A run, or of nights one generation or a part of it.

    Args:
        folder: of the run.
        generation: the number of the generation; by default the last one.
        since: the number of another one; only shards that it does not have, or not as they are in this one, are taken.

    Raises:
        UserError: see `open_run`; or the generation was pruned, or no shard is left.
    """
    found = open_run(folder, generation)
    if generation is None and since is None:
        return found
    generations = Generations(folder)
    now = generations.at(found.generation)
    if generation is not None:
        generations.expect_whole(now)
    if since is None:
        return found
    before = generations.at(since).files
    known = {shard for shard, file in now.files.items() if shard in before and before[shard].source == file.source}
    files = {shard: item for shard, item in found.files.items() if shard not in known}
    if not files:
        raise UserError(f"{folder}: generation {found.generation} has no shard that generation {since} does not have")
    return found._replace(files=files)


def finished_from(folder: str, facts: dict[str, Any], url: str) -> Finished:
    """The inverse of `Finished.facts`. Raises UserError if they are of another version; `url` is where they were read."""
    if "checkpoints" not in facts:
        raise UserError(f"{folder}: made by an older version of ecif; `ecif run` computes it anew beside what is there")
    try:
        config = Config.model_validate(facts["config"] | {"run": folder})
        checkpoints = [Checkpoint(**one) for one in facts["checkpoints"]]
        counts = Uids(**facts.get("uids", {})), ExactCopies(**facts.get("exact_copies", {}))
        return Finished(folder, config, facts["id"], checkpoints, *counts)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{url} is of no run of version {__version__}: {' '.join(str(error).split())[:200]}") from None


def write_finished(finished: Finished) -> None:
    """Write run.json. It is the last object that a run writes."""
    storage.write_bytes(storage.join(finished.folder, "run.json"), tables.json_bytes(finished.facts()))


def _finite(facts: Any) -> Any:
    """Facts with None for numbers that are not finite, which JSON does not have."""
    if isinstance(facts, dict):
        return {key: _finite(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts
