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

    @property
    def table(self) -> str:
        """Folder of the columns of the run that finished last, with one Parquet file for each shard."""
        return storage.join(self.folder, LATEST)

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
        listed = in_folder(self.table, ".parquet")
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


def open_run(folder: str) -> Finished:
    """The run that finished last in a folder.

    Raises:
        UserError: no finished run there, or one of another version.
    """
    url = storage.join(folder, "run.json")
    try:
        facts = json.loads(storage.read_bytes(url))
    except FileNotFoundError:
        raise UserError(f"{folder}: no finished run there (no run.json)") from None
    except ValueError:
        raise UserError(f"{url} is not JSON: `ecif run` writes it anew") from None
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
    facts = {
        "version": __version__,
        "config": finished.config.model_dump(mode="json"),
        "id": finished.id,
        "checkpoints": [_finite(one._asdict()) for one in finished.checkpoints],
        "uids": finished.uids._asdict(),
        "exact_copies": finished.exact_copies._asdict(),
    }
    storage.write_bytes(storage.join(finished.folder, "run.json"), tables.json_bytes(facts))


def _finite(facts: Any) -> Any:
    """Facts with None for numbers that are not finite, which JSON does not have."""
    if isinstance(facts, dict):
        return {key: _finite(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts
