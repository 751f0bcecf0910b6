"""What the driver, the readers and the actors of `embed` send each other: one class for each kind of row.

Ray Data gets rows as flat dictionaries of bytes, numbers and JSON, because the shapes of parts differ.
"""

import json
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
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

    def to_row(self) -> dict[str, Any]:
        """The row that Ray Data gets."""
        shape = list(self.pairs[0].pixels.shape) if self.pairs else [0, 0, 0]
        facts = {
            "dataset": self.dataset,
            "shard": self.shard,
            "number": self.number,
            "size": self.size,
            "shape": shape,
            "pairs": [[p.index, p.key, p.uid, p.caption, p.image_hash, p.label] for p in self.pairs],
            "refused": [[r.stage, asdict(r.pair)] for r in self.refused],
            "labelled": self.labelled,
            "accounting": self.accounting,
        }
        return {"pixels": b"".join(p.pixels.tobytes() for p in self.pairs), "facts": json.dumps(facts)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Part":
        """The inverse of `to_row`."""
        facts = json.loads(row["facts"])
        pixels = _pixels(row["pixels"], facts["shape"])
        pairs = [
            Pair(index, key, uid, caption, own, image_hash, label)
            for (index, key, uid, caption, image_hash, label), own in zip(facts["pairs"], pixels, strict=True)
        ]
        refused = [Refused(stage, Quarantined(**pair)) for stage, pair in facts["refused"]]
        done = Accounting(*facts["accounting"]) if facts["accounting"] else None
        dataset, shard, number, size = (facts[name] for name in ("dataset", "shard", "number", "size"))
        return cls(dataset, shard, number, size, pairs, refused, facts["labelled"], done)


class Embedded(NamedTuple):
    """The counts of a part that an actor has embedded and written, for the driver."""

    dataset: int
    shard: str
    size: int  # bytes of the tar
    pairs: int  # embedded
    seconds: float  # in the model
    refused: list[Refused]
    accounting: Accounting | None  # of the shard, with its last part

    def to_row(self) -> dict[str, Any]:
        """The row that Ray Data gets."""
        return {"facts": json.dumps([*self[:5], [[r.stage, asdict(r.pair)] for r in self.refused], self.accounting])}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Embedded":
        """The inverse of `to_row`."""
        dataset, shard, size, pairs, seconds, refused, done = json.loads(row["facts"])
        found = [Refused(stage, Quarantined(**pair)) for stage, pair in refused]
        return cls(dataset, shard, size, pairs, seconds, found, Accounting(*done) if done else None)


def _pixels(data: bytes, shape: list[int]) -> NDArray[np.uint8]:
    """The pixels [B, H, W, 3] of a part's pairs."""
    return np.frombuffer(data, np.uint8).reshape(-1, *shape) if data else np.empty((0, 1, 1, 3), np.uint8)
