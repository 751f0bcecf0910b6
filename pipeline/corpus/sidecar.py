"""Files of img2dataset beside `<shard>.tar`: `<shard>.parquet` has metadata by key, `<shard>_stats.json` the number of pairs.

A sidecar (`<shard>.parquet`) is in the order of the downloads and holds failed ones too. It is joined by key, not by position.
"""

import json
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.console import say
from pipeline.corpus.shards import Shard, stem
from pipeline.errors import RunError, UserError

PREFIX = "sidecar_"  # of its columns in the score table, so that no other name there collides
LOOKED_AT = 1000  # sidecars whose columns are checked before a run starts


class Sidecars(NamedTuple):
    """The sidecars of a corpus's shards."""

    found: dict[str, storage.Object]  # by shard; a shard may have none
    schema: pa.Schema  # of the columns to carry into the score table
    uids: bool  # whether uids are taken from the sidecars


def find(shards: list[Shard], columns: list[str], uids: bool, look_at: int = 1) -> Sidecars | None:
    """List the sidecars and check the columns of some. None if the configuration asks nothing of them.

    Args:
        shards: of the corpus.
        columns: to carry into the score table.
        uids: whether uids are taken from the sidecars.
        look_at: the most sidecars to check, spread over the corpus. A column has a type that holds the values of all of them.

    Raises:
        UserError: there is no sidecar, one lacks a column, has two of one name or one of another type, or a shard has none
            and uids are taken from them.
    """
    if not columns and not uids:
        return None
    _refuse_equal_names(columns)
    there = {item.url: item for folder in sorted({_folder(s) for s in shards}) for item in storage.listing(folder, ".parquet")}
    found = {s.name: there[url] for s in shards if (url := f"{stem(s.source.url)}.parquet") in there}
    missing = [s.name for s in shards if s.name not in found]
    if missing:
        without = f"corpus.sidecar: {len(missing)} of {len(shards)} shards have no .parquet beside them, such as {missing[0]}"
        if uids or not found:
            raise UserError(without)
        say(f"{without}: their columns are empty")
    some = list(found.values())
    some = [some[i * len(some) // look_at] for i in range(look_at)] if len(some) > look_at else some
    carried = list(dict.fromkeys(columns))
    needed = list(dict.fromkeys(["key", *(["uid"] if uids else []), *carried]))
    schemas = storage.in_threads(lambda item: _schema(item, needed), some)
    return Sidecars(found, _together(dict(zip((item.url for item in some), schemas, strict=True)), carried), uids)


def read_uids(data: bytes, url: str) -> dict[str, str | None]:
    """The uid of each key. If a key has several rows the first counts, as the first pair of a key does in a tar."""
    table = _read(data, url, ["uid"])
    uids = _as_text(table["uid"], url)
    return {k: u for k, u in zip(reversed(table["key"].to_pylist()), reversed(uids), strict=True)}


def columns(sidecars: Sidecars, shard: str, keys: list[str]) -> dict[str, pa.ChunkedArray]:
    """The carried columns of a shard's pairs, named as in the score table. Values without a sidecar or a row are null.

    Raises:
        RunError: a column is missing or has another type, or no key of the sidecar is in the shard.
    """
    empty = {PREFIX + f.name: pa.chunked_array([pa.nulls(len(keys), f.type)]) for f in sidecars.schema}
    if shard not in sidecars.found:
        return empty
    url = sidecars.found[shard].url
    table = _read(storage.read_bytes(url), url, sidecars.schema.names)
    if not len(table):
        return empty
    row = {key: i for i, key in reversed(list(enumerate(table["key"].to_pylist())))}
    rows = [row.get(key) for key in keys]
    if keys and not any(r is not None for r in rows):
        raise RunError(f"{url}: none of its keys is in the shard, such as {next(reversed(row), None)!r} and {keys[0]!r}")
    at = pa.array(rows, pa.int64())
    return {PREFIX + f.name: _cast(table[f.name], f.type, url).take(at) for f in sidecars.schema}


def successes(source: storage.Object) -> tuple[int | None, str]:
    """The number of pairs of a shard by its `_stats.json`, None if there is none; and what is wrong with the file, if it is."""
    url = f"{stem(source.url)}_stats.json"
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


def _refuse_equal_names(columns: list[str]) -> None:
    """Raise UserError if two names differ in case only: many readers of Parquet can't tell such columns apart."""
    seen: dict[str, str] = {}
    for column in columns:
        if seen.setdefault(column.lower(), column) != column:
            raise UserError(f"corpus.sidecar: {seen[column.lower()]!r} and {column!r} differ in case only: name one of them")


def _schema(item: storage.Object, needed: list[str]) -> pa.Schema:
    """The needed columns of a sidecar, by its footer."""
    url = item.url
    if not item.size:
        raise UserError(f"corpus.sidecar: {url} is no Parquet file: it is empty")
    try:
        schema = storage.read_schema(url)
    except pa.ArrowInvalid as error:
        raise UserError(f"corpus.sidecar: {url} is no Parquet file: {' '.join(str(error).split())[:200]}") from None
    for column in needed:
        if column not in schema.names:
            raise UserError(f"corpus.sidecar: no column {column!r} in {url}: there are {', '.join(schema.names)}")
        if schema.names.count(column) > 1:
            raise UserError(f"corpus.sidecar: {url} has two columns {column!r}: rename one, or leave both out")
    for column in ("key", "uid"):
        if column in needed and pa.types.is_nested(schema.field(column).type):
            raise UserError(f"corpus.sidecar: column {column!r} of {url} holds {schema.field(column).type}, not text")
    return pa.schema([schema.field(column).remove_metadata() for column in needed])


def _together(schemas: dict[str, pa.Schema], columns: list[str]) -> pa.Schema:
    """The columns in types that hold the values of every sidecar: integers and fractions are fractions, nulls are anything."""
    fields = []
    for column in columns:
        (first, field), *others = ((url, schema.field(column)) for url, schema in schemas.items())
        for url, other in others:
            try:
                (field,) = pa.unify_schemas([pa.schema([field]), pa.schema([other])], promote_options="permissive")
            except pa.ArrowException:
                said = f"column {column!r} holds {field.type} in {first} and {other.type} in {url}"
                raise UserError(f"corpus.sidecar: {said}: write it in one type, or leave it out") from None
        fields.append(field.with_nullable(True))
    return pa.schema(fields)


def _read(data: bytes, url: str, names: list[str]) -> pa.Table:
    """The column `key` as text, and some others as they are."""
    wanted = list(dict.fromkeys(["key", *names]))
    try:
        table = storage.parse_table(data, wanted).select(wanted)
    except (pa.ArrowException, KeyError) as error:
        raise RunError(f"{url}: not what the other sidecars are: {' '.join(str(error).split())[:300]}") from None
    return table.set_column(0, "key", _cast(table["key"], pa.string(), url))


def _cast(column: pa.ChunkedArray, to: pa.DataType, url: str) -> pa.ChunkedArray:
    try:
        return column.cast(to)
    except pa.ArrowException as error:
        raise RunError(f"{url}: not what the other sidecars are: {' '.join(str(error).split())[:300]}") from None


def _as_text(column: pa.ChunkedArray, url: str) -> list[str | None]:
    """Uids as text. Those of 16 bytes, such as Parquet's own UUIDs, are written in hex."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = pc.cast(column, column.type.storage_type)
    if pa.types.is_fixed_size_binary(column.type):
        return [value and value.hex() for value in column.to_pylist()]
    return _cast(column, pa.string(), url).to_pylist()


def _folder(shard: Shard) -> str:
    return shard.source.url.rpartition("/")[0]
