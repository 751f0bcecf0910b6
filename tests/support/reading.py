"""A shard through the reader, as a reading task does it."""

from typing import NamedTuple

from pipeline import sections, storage
from pipeline.corpus.reasons import REASONS
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Embed
from pipeline.stages.embed.read import ReadParts
from pipeline.stages.embed.rows import Part, ToRead
from tests.support.finished import PREPROCESS

FULL = PREPROCESS | {"resize_mode": "shortest", "fill_color": 0}


class Reading(NamedTuple):
    """What came out of a shard."""

    accounting: Accounting
    pairs: list[list]  # index, key, uid, caption, label
    quarantined: list[dict]
    rows: list[dict]  # of the parts, as the actors get them, but for the time that they took

    def reasons(self) -> dict[str, str]:
        """Key -> reason."""
        return {q["key"]: q["reason"] for q in self.quarantined}


def row_of(source: storage.Object, shard: str = "00000", sidecar: storage.Object | None = None, **reading) -> dict:
    """What the driver asks a reading task to do."""
    return ToRead(0, shard, source, sections.Reading(**reading), [], sidecar).to_row()


def read_shard(url: str, limits: Embed | None = None, **options) -> Reading:
    """Read a whole shard."""
    return collect(list(ReadParts(limits or Embed(), FULL)(row_of(storage.describe(url), **options))))


def collect(rows: list[dict]) -> Reading:
    """Put parts together, and hold them against what they say of themselves."""
    parts = [Part.from_row(row) for row in rows]
    assert [part.number for part in parts] == list(range(len(parts)))
    assert not any(part.accounting for part in parts[:-1])
    accounting = parts[-1].accounting
    pairs = [[p.index, p.key, p.uid, p.caption, p.label] for part in parts for p in part.pairs]
    quarantined = [vars(r.pair) | {"stage": r.stage} for part in parts for r in part.refused]
    assert accounting.parts == len(parts)
    assert accounting.members == accounting.in_pairs + accounting.ignored
    assert accounting.pairs == len(pairs) + len(quarantined)
    assert sorted([p[0] for p in pairs] + [q["index"] for q in quarantined]) == list(range(accounting.pairs))
    assert {q["reason"] for q in quarantined} <= set(REASONS)
    assert sum(part.size for part in parts) == accounting.size
    assert all(pair.pixels.shape == (8, 8, 3) for part in parts for pair in part.pairs)
    timeless = [part._replace(seconds=0.0).to_row() for part in parts]
    return Reading(accounting, pairs, quarantined, timeless)
