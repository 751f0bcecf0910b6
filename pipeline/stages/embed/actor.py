"""The computing half of stage `embed`: decoded parts in, features on storage."""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.pairs import Quarantined
from pipeline.run_folder import tables
from pipeline.sections import Model
from pipeline.stages.embed.rows import Embedded, Part, Refused
from pipeline.workers.cluster import device
from pipeline.workers.model import load

FORWARD_BATCH = {"cpu": 32, "cuda": 256}


class EmbedPart:
    """Actor: the model's features of a part, written as one Parquet object."""

    def __init__(self, folders: list[str], model: Model):
        self.device = device()
        self.towers = load(model).to(self.device)
        self.folders = folders

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embed and write one part: a row of `Embedded` for a row of `Part`."""
        part = Part.from_row(row)
        started = time.perf_counter()
        images, texts = self._features([p.pixels for p in part.pairs], [p.caption for p in part.pairs])
        seconds = time.perf_counter() - started
        finite: NDArray[np.bool_] = np.isfinite(images).all(1) & np.isfinite(texts).all(1)  # type: ignore[assignment]
        good = [p for p, ok in zip(part.pairs, finite, strict=True) if ok]
        bad = [p for p, ok in zip(part.pairs, finite, strict=True) if not ok]
        refused = [Refused("embed", Quarantined(p.index, p.key, p.uid, "non_finite_features", "")) for p in bad]
        table = tables.features_table(good, images[finite], texts[finite], part.labelled)
        url = storage.join(self.folders[part.dataset], part.shard, tables.part_name(part.number))
        storage.write_bytes(url, tables.parquet_bytes(table))
        counted = (part.dataset, part.shard, part.size, len(good), seconds)
        return Embedded(*counted, [*part.refused, *refused], part.accounting).to_row()

    def _features(
        self, pixels: list[NDArray[np.uint8]], captions: list[str]
    ) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        size = FORWARD_BATCH[self.device.type]
        images, texts = [], []
        for i in range(0, len(captions), size):
            batch = torch.from_numpy(np.stack(pixels[i : i + size])).to(self.device).permute(0, 3, 1, 2).contiguous()
            images.append(self.towers.image_features(batch).half().cpu().numpy())
            texts.append(self.towers.text_features(captions[i : i + size]).half().cpu().numpy())
        if not captions:
            d_x, d_t = self.towers.heads.image.shape[0], self.towers.heads.text.shape[0]
            return np.empty((0, d_x), np.float16), np.empty((0, d_t), np.float16)
        return np.concatenate(images), np.concatenate(texts)
