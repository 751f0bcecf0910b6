"""What many small objects say, in one object that is read at once instead.

The small objects stay the truth. The compacted one holds what each of them said, with the size and the etag that a listing
showed then. An object that a listing shows differently now is read itself. So is every object if the compacted one is missing,
damaged or of another version. Nothing is lost with it: the next run writes it anew.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pyarrow as pa

from pipeline import storage
from pipeline.run_folder import tables

SCHEMA = pa.schema([("name", pa.string()), ("size", pa.int64()), ("etag", pa.string()), ("text", pa.string())])


class Said(NamedTuple):
    """What some objects say."""

    texts: dict[str, str]  # by the name of the object, in the order of the listing
    complete: bool  # whether the compacted object said it all


def read(url: str | None, listed: dict[str, storage.Object], read_one: Callable[[storage.Object], str]) -> Said:
    """What every listed object says.

    Args:
        url: of the compacted object; None reads all objects themselves.
        listed: the objects, by name.
        read_one: reads what one object says. It is called in threads.
    """
    known = _parse(url) if url else {}
    same = {name for name, item in listed.items() if known.get(name, _NONE)[:2] == (item.size, item.etag)}
    others = [item for name, item in listed.items() if name not in same]
    said = storage.in_threads(read_one, others)
    texts = {name: known[name][2] if name in same else next(said) for name in listed}
    return Said(texts, not others)


def write(url: str, listed: dict[str, storage.Object], texts: dict[str, str]) -> None:
    """Write the compacted object.

    Args:
        url: of the compacted object.
        listed: the objects as they were when, or after, they said this; objects without a text are left out.
        texts: what they say, by name.
    """
    items = {name: listed[name] for name in sorted(texts) if name in listed}
    columns: list[Iterable[object]] = [items, (i.size for i in items.values()), (i.etag for i in items.values())]
    columns.append(texts[name] for name in items)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
    storage.write_bytes(url, tables.parquet_bytes(pa.table(arrays, SCHEMA)))


_NONE = (-1, "", "")


def _parse(url: str) -> dict[str, tuple[int, str, str]]:
    """Size, etag and text by name; empty if there is no such object, or not one that can be trusted."""
    try:
        table = storage.parse_table(storage.read_bytes(url), verify=True)
    except (OSError, ValueError, pa.ArrowException):
        return {}
    if table.schema != SCHEMA:
        return {}
    size, etag, text = (table[name].to_pylist() for name in ("size", "etag", "text"))
    return dict(zip(table["name"].to_pylist(), zip(size, etag, text, strict=True), strict=True))
