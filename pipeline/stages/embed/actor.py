"""The computing half of stage `embed`: decoded parts in, features on storage."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ecif.towers.precision import Precision
from pipeline import storage
from pipeline.corpus.pairs import Quarantined
from pipeline.run_folder import tables
from pipeline.sections import Model
from pipeline.stages.embed.forward import Forward
from pipeline.stages.embed.rows import Embedded, Part, Refused
from pipeline.stages.embed.usage import THREADS, Meter


class EmbedPart:
    """Actor: the model's features of a part, written as one Parquet object.

    It is called from `usage.THREADS` threads. So a part is written while the model computes the next one. A call ends when its
    part is written.
    """

    def __init__(self, folders: list[str], model: Model, precision: Precision | Literal["auto"]):
        self.forward, self.folders = Forward(model, precision), folders
        self.meter = Meter(THREADS[self.forward.device.type])

    def __call__(self, rows: pa.Table) -> dict[str, list[Any]]:
        """Embed and write one part: a row of `Embedded` for a row of `Part`."""
        part = Part.from_table(rows)
        with self.meter.visit(part.seconds) as visit:
            images, texts, seconds, ended = self.forward(part)
            busy = self.meter.busy(visit, seconds, ended)
            finite: NDArray[np.bool_] = np.isfinite(images).all(1) & np.isfinite(texts).all(1)  # type: ignore[assignment]
            good = [p for p, ok in zip(part.pairs, finite, strict=True) if ok]
            bad = [p for p, ok in zip(part.pairs, finite, strict=True) if not ok]
            refused = [Refused("embed", Quarantined(p.index, p.key, p.uid, "non_finite_features", "")) for p in bad]
            table = tables.features_table(good, images[finite], texts[finite], part.labelled)
            url = storage.join(self.folders[part.dataset], part.shard, tables.part_name(part.number))
            storage.write_bytes(url, tables.parquet_bytes(table))
        counted = (part.dataset, part.shard, part.size, len(good), busy)
        return Embedded(*counted, [*part.refused, *refused], part.accounting).to_columns()
