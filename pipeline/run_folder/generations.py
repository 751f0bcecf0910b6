"""The generations of a run folder: a Delta table of its columns, <run>/table, with a version for each generation.

A generation is a list of Parquet files, one for each shard. Nights write these whole, under names that are a function of what
is in them, and then commit the list in one atomic step. So a reader sees a whole generation, or the one before. Whoever reads
Delta tables, such as DuckDB, Polars, pandas or Spark, reads the table of every generation, under the number that it has here.

Each commit holds the record of its generation as JSON: how its columns were made, and what the night that made it did.
"""

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from pipeline import storage
from pipeline.errors import RunError, UserError

TABLE = "table"  # folder of the Delta table in a run folder
COLUMNS = "columns"  # folder of its files in it
RECORD = "ecif"  # the record of a generation, among what its commit says
FOR_EVER = {"delta.logRetentionDuration": "interval 36500 days", "delta.deletedFileRetentionDuration": "interval 36500 days"}


class File(NamedTuple):
    """The columns of one shard."""

    path: str  # below the table
    size: int  # bytes
    rows: int

    @property
    def shard(self) -> str:
        """Name of the shard."""
        return self.path.split("/", 2)[2].rsplit(".", 2)[0]

    @property
    def run(self) -> str:
        """Fingerprint of what the columns of all shards of a generation depend on."""
        return self.path.split("/", 2)[1]

    @property
    def source(self) -> str:
        """Fingerprint of what the shard was read from, as a listing showed it."""
        return self.path.rsplit(".", 2)[1]


class Generation(NamedTuple):
    """One generation of a run folder."""

    number: int  # the version of the Delta table
    time: float  # unix time of its commit
    record: dict[str, Any]
    files: dict[str, File]  # by shard


class Generations:
    """The generations of a run folder.

    Args:
        run: the folder, path or URL.
    """

    def __init__(self, run: str):
        self.run, self.root = run, storage.join(run, TABLE)

    def exist(self) -> bool:
        """Whether there is a generation."""
        return storage.exists(storage.join(self.root, "_delta_log", f"{0:020d}.json"))

    def url(self, file: File) -> str:
        """Where a file is."""
        return storage.join(self.root, file.path)

    def last(self) -> Generation | None:
        """The newest generation; None if there is none."""
        return self._generation(table) if (table := self._open()) else None

    def at(self, number: int | None) -> Generation:
        """A generation by its number, or the newest.

        Raises:
            UserError: there is none of this number.
        """
        newest = self._open()
        if newest is None:
            raise UserError(f"{self.run}: no generations there, which `ecif nightly` makes")
        if number is not None and not 0 <= number <= newest.version():
            raise UserError(f"{self.run}: no generation {number}; there are 0 to {newest.version()}")
        return self._generation(self._open(number) or newest)

    def history(self) -> Iterator[Generation]:
        """Every generation, the newest first, without its files."""
        table = self._open()
        return (one for commit in (table.history() if table else []) if (one := _recorded(commit)))

    def sizes(self) -> dict[str, int]:
        """The files that are there, of any generation: bytes by URL, in the form of `storage.canonical`."""
        return {item.url: item.size for item in storage.listing(storage.join(self.root, COLUMNS), ".parquet")}

    def expect_whole(self, generation: Generation) -> None:
        """Raise UserError if files of a generation are gone."""
        there, files = self.sizes(), generation.files.values()
        lost = [file for file in files if storage.canonical(self.url(file)) not in there]
        if lost:
            pruned = f"generation {generation.number} was pruned: {len(lost)} of its {len(files)} files are gone"
            raise UserError(f"{self.run}: {pruned}")

    def commit(self, files: dict[str, File], record: dict[str, Any], base: Generation | None) -> int:
        """Commit a generation, in one atomic step.

        Args:
            files: all of it, by shard. They have to exist.
            record: of the generation, plain values.
            base: the generation that was last when the work began; None if there was none.

        Returns:
            Its number.

        Raises:
            RunError: another generation was committed meanwhile.
        """
        storage.check_guard()
        said: dict[str, Any] = {
            "commit_properties": CommitProperties({RECORD: json.dumps(record)}, max_commit_retries=0),
            "post_commithook_properties": PostCommitHookProperties(cleanup_expired_logs=False),
        }
        before = base.files if base else {}
        new = [_add(file) for shard, file in sorted(files.items()) if before.get(shard) != file]
        old = [file for shard, file in sorted(before.items()) if files.get(shard) != file]
        table = self._open()
        if (table.version() if table else None) != (base.number if base else None):
            raise RunError(f"{self.root}: another generation was committed meanwhile; the same command goes on after it")
        try:
            if table is None:
                options = storage.native_options(self.root)
                create_table_with_add_actions(
                    self.root, self._schema(files), new, "error", configuration=FOR_EVER, storage_options=options, **said
                )
                return 0
            # Of one reference the columns are the same; a generation of another one replaces every file.
            same = {file.run for file in files.values()} <= {file.run for file in before.values()}
            gone = [RemoveAction(file.path, True, round(1000 * time.time()), size=file.size) for file in old] if same else []
            columns = table.schema() if same else self._schema(files)
            table.create_write_transaction([*new, *gone], "append" if same else "overwrite", columns, **said)
        except CommitFailedError as error:
            raise RunError(f"{self.root}: the generation could not be committed: {error}; the same command goes on") from None
        table.update_incremental()
        return int(table.version())

    def _schema(self, files: dict[str, File]) -> Schema:
        """Of all files, read from one of them."""
        read = storage.read_schema(self.url(next(iter(files.values()))))
        return Schema.from_arrow(pa.schema([field.remove_metadata() for field in read]))

    def _open(self, number: int | None = None) -> DeltaTable | None:
        try:
            return DeltaTable(self.root, version=number, storage_options=storage.native_options(self.root))
        except TableNotFoundError:
            return None

    def _generation(self, table: DeltaTable) -> Generation:
        listed = pa.table(table.get_add_actions(flatten=True)).select(["path", "size_bytes", "num_records"]).to_pylist()
        files = sorted(File(unquote(one["path"]), one["size_bytes"], one["num_records"]) for one in listed)
        log = storage.read_bytes(storage.join(self.root, "_delta_log", f"{table.version():020d}.json"))
        actions = map(json.loads, log.splitlines())
        recorded = next((_recorded(a["commitInfo"] | {"version": table.version()}) for a in actions if "commitInfo" in a), None)
        if recorded is None:
            raise UserError(f"{self.root}: version {table.version()} was committed by another program than ecif")
        return recorded._replace(files={file.shard: file for file in files})


def file_path(run: str, shard: str, source: str) -> str:
    """Path of a shard's columns below the table, see `File`."""
    return f"{COLUMNS}/{run}/{shard}.{source}.parquet"


def said(number: int, record: dict[str, Any]) -> str:
    """One line about the night that made a generation, from its record."""
    night = record["night"]
    shards = f"{night['new']} shards new, {night['changed']} changed, {night['gone']} gone, {night['left']} left"
    bad = ", ".join(f"{count} {reason}" for reason, count in night["quarantined"].items())
    facts = [shards, f"{night['scored']} pairs scored", f"{sum(night['quarantined'].values())} quarantined"]
    facts[-1] += f" ({bad})" if bad else ""
    if drift := night["drift"]:
        facts += [f"{drift['misaligned']:.1%} misaligned"] if drift["misaligned"] is not None else []
        facts.append("drift " + ", ".join(f"{name} {value:.2f}" for name, (value, _) in drift["measures"].items()))
        if drift["lds"]:
            facts.append("agreement with refits " + ", ".join(f"{name} {lds:.2f}" for name, lds in drift["lds"].items()))
    price = "" if night["price"] is None else f" at {night['price']:.3g}"
    facts.append(f"{sum(night['seconds'].values()):.0f} s, {night['worker_hours']:.3g} {night['workers']} hours{price}")
    return f"generation {number}: {'; '.join(facts)}; {night['pairs']} pairs of {night['shards']} shards in all"


def unknown_types(schema: pa.Schema) -> list[str]:
    """The columns of a type that a Delta table does not have, as text."""
    kinds = pa.types
    known = [kinds.is_boolean, kinds.is_signed_integer, kinds.is_float32, kinds.is_float64, kinds.is_string]
    known += [kinds.is_large_string, kinds.is_binary, kinds.is_date32]
    micro = {pa.timestamp("us"), pa.timestamp("us", "UTC")}
    return [f"{f.name} ({f.type})" for f in schema if f.type not in micro and not any(is_one(f.type) for is_one in known)]


def _recorded(commit: dict[str, Any]) -> Generation | None:
    """What a commit says about its generation; None for a commit of another program."""
    if RECORD not in commit:
        return None
    return Generation(commit["version"], commit["timestamp"] / 1000, json.loads(commit[RECORD]), {})


def _add(file: File) -> AddAction:
    return AddAction(file.path, file.size, {}, 0, True, json.dumps({"numRecords": file.rows}))
