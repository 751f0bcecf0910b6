"""A shard through the reader, as a reading task does it."""

import json
from typing import NamedTuple

from pipeline import storage
from pipeline.config import Embed
from pipeline.corpus.reasons import REASONS
from pipeline.run_folder.tables import Accounting
from pipeline.stages.embed.read import ReadParts
from tests.support.finished import PREPROCESS

FULL = PREPROCESS | {"resize_mode": "shortest", "fill_color": 0}


class Reading(NamedTuple):
    """What came out of a shard."""

    accounting: Accounting
    pairs: list[list]  # index, key, uid, caption, label
    quarantined: list[dict]
    parts: list[dict]

    def reasons(self) -> dict[str, str]:
        """Key -> reason."""
        return {q["key"]: q["reason"] for q in self.quarantined}


def row_of(source: storage.Object, shard: str = "00000", caption: str = "txt", sidecar: storage.Object | None = None) -> dict:
    """What the driver asks a reading task to do."""
    asked = {"caption": caption, "classes": "[]", "sidecar": json.dumps(sidecar)}
    return {"dataset": 0, "shard": shard, **asked, **source._asdict()}


def read_shard(url: str, limits: Embed | None = None, **options) -> Reading:
    """Read a whole shard."""
    return collect(list(ReadParts(limits or Embed(), FULL)(row_of(storage.describe(url), **options))))


def collect(parts: list[dict]) -> Reading:
    """Put parts together, and hold them against what they say of themselves."""
    assert [part["part"] for part in parts] == list(range(len(parts)))
    assert not any(part["accounting"] for part in parts[:-1])
    accounting = Accounting(**json.loads(parts[-1]["accounting"]))
    pairs = [pair for part in parts for pair in json.loads(part["pairs"])]
    quarantined = [q for part in parts for q in json.loads(part["quarantined"])]
    assert accounting.parts == len(parts)
    assert accounting.members == accounting.in_pairs + accounting.ignored
    assert accounting.pairs == len(pairs) + len(quarantined)
    assert sorted([p[0] for p in pairs] + [q["index"] for q in quarantined]) == list(range(accounting.pairs))
    assert {q["reason"] for q in quarantined} <= set(REASONS)
    assert sum(part["bytes"] for part in parts) == accounting.size
    for part in parts:
        assert len(part["pixels"]) == len(json.loads(part["pairs"])) * 3 * 8 * 8
    return Reading(accounting, pairs, quarantined, parts)
