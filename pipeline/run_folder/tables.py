"""The Parquet tables of a run: their schemas, and deterministic bytes for them."""

import io
import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.pairs import Pair, Quarantined

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


IDENTITY = ["shard", "index", "key", "uid", "batch"]  # of the index's tables


class Features(NamedTuple):
    """The features of a shard's valid pairs, in the order of the tar."""

    position: NDArray[np.int32]  # [N] index in the tar
    key: list[str]
    uid: list[str]
    images: NDArray[np.float16]  # [N, d_x]
    texts: NDArray[np.float16]  # [N, d_t]
    labels: NDArray[np.int32] | None = None  # [N] classes, of a classification dataset


class Accounting(NamedTuple):
    """What became of a shard's members and pairs: <run>/shards/<fingerprint>/<shard>.json."""

    shard: str
    size: int  # bytes
    etag: str
    sha256: str
    members: int
    in_pairs: int  # members that are parts of pairs
    ignored: int  # members that belong to no pair; members = in_pairs + ignored
    pairs: int
    embedded: int
    quarantined: dict[str, int]  # by reason; pairs = embedded + all of these
    parts: int
    broken: str | None  # why the tar ended before its end
    successes: int | None = None  # pairs by the shard's _stats.json, where there is one
    sidecar: list[str] | None = None  # etag and sha256 of the sidecar that the uids are from
    unusable: str = ""  # sha256 of the indices and reasons of its quarantined pairs, where there are any

    @property
    def lost(self) -> int:
        """Pairs that `_stats.json` counts and the tar does not hold."""
        return max(0, (self.successes or 0) - self.pairs)


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file; the same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def features_table(
    pairs: list[Pair], images: NDArray[np.float16], texts: NDArray[np.float16], labelled: bool = False
) -> pa.Table:
    """One part of a shard: identities and features, and the class of each pair where the dataset has classes."""
    columns = {
        "index": pa.array([p.index for p in pairs], pa.int32()),
        "key": pa.array([p.key for p in pairs], pa.string()),
        "uid": pa.array([p.uid for p in pairs], pa.string()),
        "image_features": _vectors(images),
        "text_features": _vectors(texts),
    }
    return pa.table(columns | ({"label": pa.array([p.label for p in pairs], pa.int32())} if labelled else {}))


def read_features(folder: str, parts: int) -> Features:
    """All parts of a shard as one."""
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, part_name(i))))) for i in range(parts)]
    return as_features(pa.concat_tables(tables).combine_chunks())


def as_features(table: pa.Table) -> Features:
    """The inverse of `features_table`."""
    return Features(
        table["index"].to_numpy(),
        table["key"].to_pylist(),
        table["uid"].to_pylist(),
        _matrix(table["image_features"]),
        _matrix(table["text_features"]),
        table["label"].to_numpy() if "label" in table.column_names else None,
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


class Halves(NamedTuple):
    """Vectors in fp16, each over its largest magnitude: fp16 keeps 3 digits from 6e-5 to 65504 only."""

    values: NDArray[np.float16]  # [N, k], largest magnitude of a row 1
    scale: NDArray[np.float32]  # [N] row n is values_n scale_n

    @staticmethod
    def empty(rows: int, size: int) -> "Halves":
        """To be filled by `put`."""
        return Halves(np.empty((rows, size), np.float16), np.empty(rows, np.float32))

    def put(self, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Set some rows to vectors [n, k]."""
        scale = np.abs(vectors).max(1)
        self.scale[rows] = scale
        self.values[rows] = vectors / np.where(scale > 0, scale, 1)[:, None]

    def vectors(self) -> NDArray[np.float32]:
        """[N, k]."""
        return self.values * self.scale[:, None]


def index_table(identity: dict[str, Any], positive: Halves, negative: Halves) -> pa.Table:
    """One shard of the index: identities and both parts of every pair's projected gradient."""
    columns = scores_table(identity, {})
    for name, part in (("positive", positive), ("negative", negative)):
        columns = columns.append_column(name, _vectors(part.values))
        columns = columns.append_column(f"{name}_scale", pa.array(part.scale, pa.float32()))
    return columns


def read_gradients(table: pa.Table) -> list[NDArray[np.float32]]:
    """Positive and negative part, each [N, k], of a table of the index."""
    return [Halves(_matrix(table[name]), table[f"{name}_scale"].to_numpy()).vectors() for name in ("positive", "negative")]


def self_influence_table(index: pa.Table, gram: NDArray[np.float64], self_influence: NDArray[np.float64]) -> pa.Table:
    """One shard's self-influence [N], and the Gram matrices [N, 2, 2] of both parts' parameter changes."""
    columns = {"self_influence": self_influence, "gram_positive": gram[:, 0, 0]}
    columns |= {"gram_mixed": gram[:, 0, 1], "gram_negative": gram[:, 1, 1]}
    return pa.table({name: index[name] for name in IDENTITY} | {name: pa.array(v, pa.float64()) for name, v in columns.items()})


def read_self_influence(table: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gram matrices [N, 2, 2] and self-influence [N]."""
    a, b, d = (table[f"gram_{name}"].to_numpy() for name in ("positive", "mixed", "negative"))
    return np.stack([a, b, b, d], 1).reshape(-1, 2, 2), table["self_influence"].to_numpy()


def read_table(url: str) -> pa.Table:
    """A Parquet object."""
    return pq.read_table(io.BytesIO(storage.read_bytes(url)))


def json_bytes(value: Any) -> bytes:
    """Readable JSON with sorted keys; the same value gives the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _vectors(matrix: NDArray[np.float16]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.flatten().to_numpy().reshape(len(column), column.type.list_size)
