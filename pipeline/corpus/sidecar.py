"""Files of img2dataset beside `<shard>.tar`: `<shard>.parquet` has metadata by key, `<shard>_stats.json` the number of pairs.

A sidecar (`<shard>.parquet`) is in the order of the downloads and holds failed ones too. It is joined by key, not by position.
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

PREFIX = "sidecar_"  # of its columns in the score table, so that no other name there collides


class Sidecars(NamedTuple):
    """The sidecars of a corpus's shards."""

    found: dict[str, storage.Object]  # by shard; a shard may have none
    schema: pa.Schema  # of the columns to carry into the score table, as in the first sidecar
    uids: bool  # whether uids are taken from the sidecars


def find(shards: list[Shard], columns: list[str], uids: bool) -> Sidecars | None:
    """List the sidecars and check the first. None if the configuration asks nothing of them.

    Raises:
        UserError: there is no sidecar, the first lacks a column, or a shard has none and uids are taken from them.
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
    """The uid of each key. If a key has several rows the first counts, as the first pair of a key does in a tar."""
    table = _read(data, url, pa.schema([("uid", pa.string())]))
    return {k: u for k, u in zip(reversed(table["key"].to_pylist()), reversed(table["uid"].to_pylist()), strict=True)}


def columns(sidecars: Sidecars, shard: str, keys: list[str]) -> dict[str, pa.ChunkedArray]:
    """The carried columns of a shard's pairs, named as in the score table. Values without a sidecar or a row are null.

    Raises:
        RunError: a column is missing or has another type, or no key of the sidecar is in the shard.
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


def successes(source: storage.Object) -> tuple[int | None, str]:
    """The number of pairs of a shard by its `_stats.json`, None if there is none; and what is wrong with the file, if it is."""
    url = f"{_stem(source.url)}_stats.json"
    try:
        stats = json.loads(storage.read_bytes(url))
    except (FileNotFoundError, PermissionError):  # the second is the answer for a missing object, if listing is forbidden
        return None, ""
    except (ValueError, RecursionError):
        return None, "its _stats.json is no JSON, so pairs that are lost can't be counted"
    count = stats.get("successes") if isinstance(stats, dict) else None
    if isinstance(count, int | float) and not isinstance(count, bool) and count >= 0 and count % 1 == 0:
        return int(count), ""
    return None, "its _stats.json has no number of successes, so pairs that are lost can't be counted"


def _read(data: bytes, url: str, schema: pa.Schema) -> pa.Table:
    """The column `key` as text, and the columns of a schema in its types."""
    schema = schema.insert(0, pa.field("key", pa.string()))
    try:
        return pq.read_table(io.BytesIO(data), columns=schema.names).select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError) as error:
        raise RunError(f"{url}: not what the first sidecar is: {' '.join(str(error).split())[:300]}") from None


def _stem(url: str) -> str:
    return url.removesuffix(".tar")


def _folder(shard: Shard) -> str:
    return shard.source.url.rpartition("/")[0]
