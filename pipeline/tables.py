"""The Parquet tables of a run: their schemas, and deterministic bytes for them."""

import io
import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.samples import Pair, Quarantined

QUARANTINE = pa.schema(
    [
        ("shard", pa.string()),
        ("index", pa.int32()),
        ("key", pa.string()),
        ("uid", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


class Features(NamedTuple):
    """The features of a shard's valid pairs, in the order of the tar."""

    position: NDArray[np.int32]  # [N] index in the tar
    key: list[str]
    uid: list[str]
    images: NDArray[np.float16]  # [N, d_x]
    texts: NDArray[np.float16]  # [N, d_t]


class Accounting(NamedTuple):
    """What became of a shard's members and pairs: <run>/shards/<fingerprint>/<shard>.json."""

    shard: str
    size: int  # bytes
    etag: str
    sha256: str
    members: int
    ignored: int  # members that belong to no pair
    pairs: int
    embedded: int
    quarantined: dict[str, int]  # by reason; pairs = embedded + all of these
    parts: int
    broken: str | None  # why the tar ended before its end


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file; the same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def features_table(pairs: list[Pair], images: NDArray[np.float16], texts: NDArray[np.float16]) -> pa.Table:
    """One part of a shard: identities and features."""
    return pa.table(
        {
            "index": pa.array([p.index for p in pairs], pa.int32()),
            "key": pa.array([p.key for p in pairs], pa.string()),
            "uid": pa.array([p.uid for p in pairs], pa.string()),
            "image_features": _vectors(images),
            "text_features": _vectors(texts),
        }
    )


def read_features(folder: str, parts: int) -> Features:
    """All parts of a shard as one."""
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, part_name(i))))) for i in range(parts)]
    table = pa.concat_tables(tables).combine_chunks()
    return Features(
        table["index"].to_numpy(),
        table["key"].to_pylist(),
        table["uid"].to_pylist(),
        _matrix(table["image_features"]),
        _matrix(table["text_features"]),
    )


def part_name(part: int) -> str:
    """File name of a shard's part."""
    return f"{part:05d}.parquet"


def quarantine_table(shard: str, rows: list[tuple[str, Quarantined]]) -> pa.Table:
    """(stage, pair) rows of one shard."""
    columns = [
        [shard] * len(rows),
        [q.index for _, q in rows],
        [q.key for _, q in rows],
        [q.uid for _, q in rows],
        [stage for stage, _ in rows],
        [q.reason for _, q in rows],
        [q.detail for _, q in rows],
    ]
    return pa.table([pa.array(c, t) for c, t in zip(columns, QUARANTINE.types, strict=True)], schema=QUARANTINE)


def scores_table(identity: dict[str, Any], scores: dict[str, NDArray[np.float32]]) -> pa.Table:
    """The columns of one shard: `shard, index, key, uid, batch, fold`, then scores in float32."""
    types = {"index": pa.int32(), "batch": pa.int32(), "fold": pa.int16()}
    columns = {name: pa.array(values, types.get(name, pa.string())) for name, values in identity.items()}
    return pa.table(columns | {name: pa.array(values, pa.float32()) for name, values in scores.items()})


def json_bytes(value: Any) -> bytes:
    """Readable JSON with sorted keys; the same value gives the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _vectors(matrix: NDArray[np.float16]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.flatten().to_numpy().reshape(len(column), column.type.list_size)
