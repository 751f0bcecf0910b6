"""What the driver, the readers and the actors of `embed` send each other: one class for each kind of row.

Ray Data gets rows as flat dictionaries of bytes, numbers and JSON, because the shapes of parts differ.
"""

import json
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.pairs import Pair, Quarantined
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Reading


class ToRead(NamedTuple):
    """A shard that a reader decodes."""

    dataset: int  # position among the datasets of the stage
    shard: str
    source: storage.Object
    reading: Reading
    classes: list[str]  # of a labelled dataset, a caption for each class
    uids: storage.Object | None  # the sidecar that holds the uids; None if the JSON does

    def to_row(self) -> dict[str, Any]:
        """The row that Ray Data gets."""
        return {"size": self.source.size, "facts": json.dumps(self)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "ToRead":
        """The inverse of `to_row`."""
        dataset, shard, source, reading, classes, uids = json.loads(row["facts"])
        beside = storage.Object(*uids) if uids else None
        return cls(dataset, shard, storage.Object(*source), Reading(*reading), classes, beside)


class Refused(NamedTuple):
    """A pair that can't be used, and the half of the stage that refused it."""

    stage: str  # `read` or `embed`
    pair: Quarantined


class Part(NamedTuple):
    """Some consecutive pairs of a shard, decoded. The last part of a shard carries the shard's accounting."""

    dataset: int
    shard: str
    number: int  # among the shard's parts
    size: int  # bytes of the tar that the part spans
    pairs: list[Pair]
    refused: list[Refused]
    labelled: bool  # pairs have classes
    accounting: Accounting | None
    tokens: NDArray[np.int32] | None = None  # [B, L] of the captions; None to leave them to the actor
    seconds: float = 0.0  # that a reader took for it
    pixels: NDArray[np.uint8] | None = None  # [B, H, W, 3] of all pairs, as an actor gets them

    def to_row(self) -> dict[str, Any]:
        """The row that Ray Data gets."""
        facts = {
            "dataset": self.dataset,
            "shard": self.shard,
            "number": self.number,
            "size": self.size,
            "seconds": self.seconds,
            "shape": list(self.pairs[0].pixels.shape) if self.pairs else [1, 1, 3],
            "length": None if self.tokens is None else self.tokens.shape[1],
            "pairs": [[p.index, p.key, p.uid, p.caption, p.image_hash, p.label] for p in self.pairs],
            "refused": [[r.stage, asdict(r.pair)] for r in self.refused],
            "labelled": self.labelled,
            "accounting": self.accounting,
        }
        tokens = b"" if self.tokens is None else self.tokens.tobytes()
        return {"pixels": b"".join(p.pixels.data for p in self.pairs), "tokens": tokens, "facts": json.dumps(facts)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Part":
        """The inverse of `to_row`. Pixels and tokens are not copied."""
        facts = json.loads(row["facts"])
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(-1, *facts["shape"])
        length = facts["length"]
        tokens = None if length is None else np.frombuffer(row["tokens"], np.int32).reshape(-1, length)
        pairs = [
            Pair(index, key, uid, caption, own, image_hash, label)
            for (index, key, uid, caption, image_hash, label), own in zip(facts["pairs"], pixels, strict=True)
        ]
        refused = [Refused(stage, Quarantined(**pair)) for stage, pair in facts["refused"]]
        done = Accounting(*facts["accounting"]) if facts["accounting"] else None
        dataset, shard, number, size = (facts[name] for name in ("dataset", "shard", "number", "size"))
        return cls(dataset, shard, number, size, pairs, refused, facts["labelled"], done, tokens, facts["seconds"], pixels)

    @classmethod
    def from_table(cls, rows: pa.Table) -> "Part":
        """The part in a table of one row, as an actor gets it. Pixels and tokens are not copied out of Ray's object store."""
        row = {name: _bytes(rows[name].chunk(0)) for name in ("pixels", "tokens")}
        return cls.from_row(row | {"facts": rows["facts"][0].as_py()})


class Busy(NamedTuple):
    """What the model of an actor did for a part, and before it since the part before. Seconds."""

    model: float = 0.0  # at work
    readers: float = 0.0  # waiting for a part
    storage: float = 0.0  # waiting while all of the actor's threads wrote
    reading: float = 0.0  # that a reader took for the part


class Embedded(NamedTuple):
    """The counts of a part that an actor has embedded and written, for the driver."""

    dataset: int
    shard: str
    size: int  # bytes of the tar
    pairs: int  # embedded
    busy: Busy
    refused: list[Refused]
    accounting: Accounting | None  # of the shard, with its last part

    def to_row(self) -> dict[str, Any]:
        """The row that Ray Data gets."""
        return {"facts": json.dumps([*self[:5], [[r.stage, asdict(r.pair)] for r in self.refused], self.accounting])}

    def to_columns(self) -> dict[str, list[Any]]:
        """The same as a batch of one row."""
        return {name: [value] for name, value in self.to_row().items()}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Embedded":
        """The inverse of `to_row`."""
        dataset, shard, size, pairs, busy, refused, done = json.loads(row["facts"])
        found = [Refused(stage, Quarantined(**pair)) for stage, pair in refused]
        return cls(dataset, shard, size, pairs, Busy(*busy), found, Accounting(*done) if done else None)


def _bytes(array: pa.Array) -> Any:
    """The bytes of the first value, where they are: a scalar of Arrow would be a copy."""
    _, offsets, data = array.buffers()
    kind = np.int64 if pa.types.is_large_binary(array.type) else np.int32
    start, end = np.frombuffer(offsets, kind)[array.offset : array.offset + 2].tolist()
    return data.slice(start, end - start) if data else b""
