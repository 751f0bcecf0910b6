"""The Parquet tables of a run: their schemas, and deterministic bytes for them."""

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.pairs import Pair, Quarantined

if TYPE_CHECKING:
    from ecif.columns import Column

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


INDEXED = ["shard", "index", "key", "uid", "batch"]  # identities in the index's tables


class Features(NamedTuple):
    """The features of a shard's valid pairs, in the order of the tar."""

    position: NDArray[np.int32]  # [N] index in the tar
    key: list[str]
    uid: list[str]
    image_hash: list[str]  # see `Pair.image_hash`
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
    broken: str | None  # why the tar could not be read to its end; None if it could
    successes: int | None = None  # number of pairs in the shard's _stats.json, if there is one
    sidecar: list[str] | None = None  # etag and sha256 of the sidecar that holds the uids
    unusable: str = ""  # sha256 of the indices and reasons of its quarantined pairs; empty if there are none
    without_uid: int = 0  # pairs that were read and have no uid; theirs is a hash of shard and key
    other_uid: int = 0  # pairs that were read and whose uid is not 32 hex digits; theirs is that hash, too
    other_uid_example: str = ""
    swallowed: int = 0  # members in pairs that the first dot put under the key of another pair
    remarks: dict[str, str] | None = None  # what is odd about the shard, by the kind of oddity

    @property
    def content(self) -> str:
        """Fingerprint of everything that the shard's features depend on, beside the model and the rules of reading.

        The unusable pairs are part of it, because they are no function of the bytes alone: a failing device gives
        `non_finite_features`.
        """
        read = [self.sha256, (self.sidecar or ["", ""])[1], self.unusable]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]

    @property
    def lost(self) -> int:
        """Pairs that `_stats.json` counts and the tar does not hold."""
        return max(0, (self.successes or 0) - self.pairs)


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file; the same table gives the same bytes.

    Vectors in fp16 are stored as they are. A codec or a dictionary makes them no smaller, and writing them five times slower.
    """
    buffer, how = io.BytesIO(), dict[str, Any](compression="zstd")
    vectors = [field.name for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    if vectors:
        others = [name for name in table.column_names if name not in vectors]
        plain = {f"{name}.list.element": "none" for name in vectors}
        how = {"compression": dict.fromkeys(others, "zstd") | plain, "use_dictionary": others, "write_statistics": others}
    pq.write_table(table, buffer, write_page_checksum=True, **how)
    return buffer.getvalue()


def features_table(
    pairs: list[Pair], images: NDArray[np.float16], texts: NDArray[np.float16], labelled: bool = False
) -> pa.Table:
    """One part of a shard: identities and features, and the class of each pair where the dataset has classes."""
    columns = {
        "index": pa.array([p.index for p in pairs], pa.int32()),
        "key": pa.array([p.key for p in pairs], pa.string()),
        "uid": pa.array([p.uid for p in pairs], pa.string()),
        "image_hash": pa.array([p.image_hash for p in pairs], pa.string()),
        "image_features": _vectors(images),
        "text_features": _vectors(texts),
    }
    return pa.table(columns | ({"label": pa.array([p.label for p in pairs], pa.int32())} if labelled else {}))


def read_features(folder: str, parts: int) -> Features:
    """Read all parts of a shard as one, in threads."""
    tables = storage.in_threads(read_table, (storage.join(folder, part_name(i)) for i in range(parts)))
    return as_features(pa.concat_tables(tables).combine_chunks())


def as_features(table: pa.Table) -> Features:
    """The inverse of `features_table`."""
    return Features(
        table["index"].to_numpy(),
        table["key"].to_pylist(),
        table["uid"].to_pylist(),
        table["image_hash"].to_pylist(),
        _matrix(table["image_features"]),
        _matrix(table["text_features"]),
        table["label"].to_numpy() if "label" in table.column_names else None,
    )


def part_name(part: int) -> str:
    """File name of a shard's part."""
    return f"{part:05d}.parquet"


def quarantine_table(shard: str, rows: list[tuple[str, Quarantined]]) -> pa.Table:
    """The quarantine table of one shard, from rows of (stage, pair)."""
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


def identity(
    shard: str, features: Features, batch: NDArray[np.int32], fold: NDArray[np.int16] | None = None
) -> dict[str, pa.Array]:
    """The columns that say which pair each row of a shard's table is: with `fold` all of them, without it those of INDEXED."""
    columns = {
        "shard": pa.array([shard] * len(features.uid), pa.string()),
        "index": pa.array(features.position, pa.int32()),
        "key": pa.array(features.key, pa.string()),
        "uid": pa.array(features.uid, pa.string()),
        "batch": pa.array(batch, pa.int32()),
    }
    if fold is None:
        return columns
    from pipeline.run_folder.columns import IDENTITY  # imports torch, which readers of shards are spared

    columns |= {"image_hash": pa.array(features.image_hash, pa.string()), "fold": pa.array(fold, pa.int16())}
    return {name: columns[name] for name in IDENTITY}


def scores_table(identity: dict[str, pa.Array], scores: dict[str, NDArray[np.float32]]) -> pa.Table:
    """Identities, then scores in float32."""
    return pa.table(identity | {name: pa.array(values, pa.float32()) for name, values in scores.items()})


def described(table: pa.Table, columns: "list[Column]", run: str, shard: str) -> pa.Table:
    """A table whose schema says what every column means, and which run it is from.

    Args:
        table: of a shard.
        columns: the scores in the table.
        run: fingerprint of what the columns of all shards depend on.
        shard: fingerprint of what the columns of this shard depend on beside that.
    """
    from ecif import __version__
    from pipeline.run_folder.columns import IDENTITY

    known = {column.name: {"says": column.says, "unit": column.unit, "good": column.good} for column in columns}
    known |= {name: {"says": says} for name, says in IDENTITY.items()}
    fields = [field.with_metadata(known.get(field.name)) for field in table.schema]
    facts = {"ecif.run": run, "ecif.shard": shard, "ecif.version": __version__}
    return table.cast(pa.schema(fields, facts))


def good_end(field: pa.Field) -> str:
    """Which end of a column is good, from the field's metadata: `low`, or `high` by default."""
    return (field.metadata or {}).get(b"good", b"high").decode()


def run_of(schema: pa.Schema) -> tuple[str, str]:
    """Fingerprints of the run and of the shard, from a table's schema. Empty strings if the schema has none."""
    facts = schema.metadata or {}
    return facts.get(b"ecif.run", b"").decode(), facts.get(b"ecif.shard", b"").decode()


def read_run(url: str) -> tuple[str, str]:
    """`run_of` the table at a URL. Empty strings if it can't be read."""
    try:
        return run_of(storage.read_schema(url))
    except pa.ArrowInvalid:
        return "", ""


class HalfPrecision(NamedTuple):
    """Vectors in fp16, each divided by its largest magnitude: fp16 keeps 3 digits only between 6e-5 and 65504."""

    values: NDArray[np.float16]  # [N, k]; the largest magnitude in a row is 1
    scale: NDArray[np.float32]  # [N]; vector n is values[n] * scale[n]

    @staticmethod
    def empty(rows: int, size: int) -> "HalfPrecision":
        """Rows that `put` has to fill."""
        return HalfPrecision(np.empty((rows, size), np.float16), np.empty(rows, np.float32))

    def put(self, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Set some rows to vectors [n, k]."""
        scale = np.abs(vectors).max(1)
        self.scale[rows] = scale
        self.values[rows] = vectors / np.where(scale > 0, scale, 1)[:, None]

    def vectors(self) -> NDArray[np.float32]:
        """The vectors [N, k] in float32."""
        return self.values * self.scale[:, None]


def index_table(identity: dict[str, pa.Array], positive: HalfPrecision, negative: HalfPrecision) -> pa.Table:
    """One shard of the index: identities and both parts of every pair's projected gradient."""
    columns = scores_table(identity, {})
    for name, part in (("positive", positive), ("negative", negative)):
        columns = columns.append_column(name, _vectors(part.values))
        columns = columns.append_column(f"{name}_scale", pa.array(part.scale, pa.float32()))
    return columns


def read_gradients(table: pa.Table) -> list[NDArray[np.float32]]:
    """Positive and negative part, each [N, k] in float32, from a table of the index."""
    parts = ((_matrix(table[name]), table[f"{name}_scale"].to_numpy()) for name in ("positive", "negative"))
    return [HalfPrecision(*part).vectors() for part in parts]


def self_influence_table(index: pa.Table, gram: NDArray[np.float64], self_influence: NDArray[np.float64]) -> pa.Table:
    """One shard's self-influence [N], and the Gram matrices [N, 2, 2] of both parts' parameter changes."""
    columns = {"self_influence": self_influence, "gram_positive": gram[:, 0, 0]}
    columns |= {"gram_mixed": gram[:, 0, 1], "gram_negative": gram[:, 1, 1]}
    return pa.table({name: index[name] for name in INDEXED} | {name: pa.array(v, pa.float64()) for name, v in columns.items()})


def read_self_influence(table: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gram matrices [N, 2, 2] and self-influence [N]."""
    a, b, d = (table[f"gram_{name}"].to_numpy() for name in ("positive", "mixed", "negative"))
    return np.stack([a, b, b, d], 1).reshape(-1, 2, 2), table["self_influence"].to_numpy()


def read_table(url: str) -> pa.Table:
    """Read a Parquet object."""
    return storage.parse_table(storage.read_bytes(url))


def json_bytes(value: Any) -> bytes:
    """Readable JSON with sorted keys; the same value gives the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _vectors(matrix: NDArray[np.float16]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.flatten().to_numpy().reshape(len(column), column.type.list_size)
