"""What img2dataset leaves beside `<shard>.tar`: `<shard>.parquet` with metadata by key, `<shard>_stats.json` with a count.

A sidecar is in the order of the downloads and holds the failed ones too: it is joined by key, never by position.
"""

import io
import json
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.console import say
from pipeline.corpus.shards import Shard
from pipeline.errors import RunError, UserError

PREFIX = "sidecar_"  # of the columns in the score table: no name there can collide


class Sidecars(NamedTuple):
    """The sidecars of a corpus's shards."""

    found: dict[str, storage.Object]  # by shard; a shard may have none
    schema: pa.Schema  # of the columns to carry, as in the first sidecar
    uids: bool  # whether pairs have their uid from there


def find(shards: list[Shard], columns: list[str], uids: bool) -> Sidecars | None:
    """List the sidecars, and check the first; None where nothing is asked of them.

    Raises:
        UserError: there is none, the first lacks a column, or uids are to be from there and a shard has none.
    """
    if not columns and not uids:
        return None
    there = {item.url: item for folder in sorted({_folder(s) for s in shards}) for item in storage.listing(folder, ".parquet")}
    found = {s.name: there[url] for s in shards if (url := f"{_stem(s.source.url)}.parquet") in there}
    missing = [s.name for s in shards if s.name not in found]
    if missing:
        without = f"corpus.sidecar: {len(missing)} of {len(shards)} shards have no .parquet beside them, such as {missing[0]}"
        if uids or not found:
            raise UserError(without)
        say(f"{without}: their columns are empty")
    first = next(iter(found.values())).url
    try:
        schema = pq.read_schema(io.BytesIO(storage.read_bytes(first)))
    except pa.ArrowInvalid as error:
        raise UserError(f"corpus.sidecar: {first} is no Parquet file: {error}") from None
    for column in ["key", *(["uid"] if uids else []), *columns]:
        if column not in schema.names:
            raise UserError(f"corpus.sidecar: no column {column!r} in {first}: there are {', '.join(schema.names)}")
    return Sidecars(found, pa.schema([schema.field(c).remove_metadata() for c in dict.fromkeys(columns)]), uids)


def read_uids(data: bytes, url: str) -> dict[str, str]:
    """The uid of each key; the first row of a key counts, as the first pair of a key does in a tar."""
    table = _read(data, url, pa.schema([("uid", pa.string())]))
    return {k: u for k, u in zip(reversed(table["key"].to_pylist()), reversed(table["uid"].to_pylist()), strict=True)}


def columns(sidecars: Sidecars, shard: str, keys: list[str]) -> dict[str, pa.ChunkedArray]:
    """The carried columns of a shard's pairs, named for the score table; null where there is no sidecar or no such key.

    Raises:
        RunError: a sidecar without a column or with another type, or of which no key is in the shard.
    """
    if shard not in sidecars.found:
        return {PREFIX + f.name: pa.chunked_array([pa.nulls(len(keys), f.type)]) for f in sidecars.schema}
    url = sidecars.found[shard].url
    table = _read(storage.read_bytes(url), url, sidecars.schema)
    row = {key: i for i, key in reversed(list(enumerate(table["key"].to_pylist())))}
    rows = [row.get(key) for key in keys]
    if keys and not any(r is not None for r in rows):
        raise RunError(f"{url}: none of its keys is in the shard, such as {next(reversed(row), None)!r} and {keys[0]!r}")
    return {PREFIX + f.name: table[f.name].take(pa.array(rows, pa.int64())) for f in sidecars.schema}


def successes(source: storage.Object) -> int | None:
    """How many pairs img2dataset says that it wrote to a shard; None where it left no `_stats.json`.

    Raises:
        RunError: the file is there and says nothing.
    """
    url = f"{_stem(source.url)}_stats.json"
    try:
        stats = json.loads(storage.read_bytes(url))
        return int(stats["successes"])
    except (FileNotFoundError, PermissionError):  # what a store says of a missing object to who may not list
        return None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{url} has no count of successes ({type(error).__name__}: {error}); mend it, or remove it") from None


def _read(data: bytes, url: str, schema: pa.Schema) -> pa.Table:
    """`key` as text and the columns of a schema, in its types."""
    schema = schema.insert(0, pa.field("key", pa.string()))
    try:
        return pq.read_table(io.BytesIO(data), columns=schema.names).select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError) as error:
        raise RunError(f"{url}: not what the first sidecar is: {' '.join(str(error).split())[:300]}") from None


def _stem(url: str) -> str:
    return url.removesuffix(".tar")


def _folder(shard: Shard) -> str:
    return shard.source.url.rpartition("/")[0]
