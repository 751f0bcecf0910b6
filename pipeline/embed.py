"""Stage `embed`: shards in, features out. The only stage that touches images: decode once, ask many questions."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from ecif import towers
from pipeline import storage, tables
from pipeline.cluster import Resources, device
from pipeline.config import Embed, Model
from pipeline.dataset import Dataset
from pipeline.errors import RunError
from pipeline.progress import Stage
from pipeline.samples import Pair, Quarantined, read_pair
from pipeline.tables import Accounting
from pipeline.tar import Contents, groups

FORWARD_BATCH = {"cpu": 32, "cuda": 256}


def embed(
    datasets: list[Dataset], model: Model, limits: Embed, preprocess: dict[str, Any], resources: Resources
) -> float | None:
    """Embed every shard of some datasets that is not done yet.

    Reading tasks decode shards into parts; a pool of actors embeds each part and writes it; a shard's accounting is written
    last, when all of its parts are there.

    Returns:
        Seconds in the model, a pair; None if there was nothing to do.

    Raises:
        RunError: a shard's parts and its accounting do not add up.
    """
    rows, total = [], 0
    for i, dataset in enumerate(datasets):
        done = dataset.forget_changed()
        total += sum(shard.source.size for shard in dataset.shards)
        todo = [shard for shard in dataset.shards if shard.name not in done]
        rows += [{"dataset": i, "caption": dataset.caption, "shard": s.name, **s.source._asdict()} for s in todo]
    left = sum(row["size"] for row in rows)
    seconds, pairs = 0.0, 0
    with Stage("embed", total, total - left) as progress:
        if not rows:
            return None
        parts = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .flat_map(ReadParts(limits, preprocess), **resources.reader)
            .map(
                EmbedPart,
                fn_constructor_args=([d.features_folder("") for d in datasets], model),
                compute=ray.data.ActorPoolStrategy(size=min(resources.workers, len(rows))),
                **resources.actor,
            )
        )
        waiting: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for row in parts.iter_rows():
            pairs += row["embedded"]
            seconds += row["seconds"]
            progress.advance(row["bytes"], f"{pairs} pairs")
            of_shard = waiting.setdefault((row["dataset"], row["shard"]), [])
            of_shard.append(row)
            finished = next((json.loads(r["accounting"]) for r in of_shard if r["accounting"]), None)
            if finished and len(of_shard) == finished["parts"]:
                _finish(datasets[row["dataset"]], finished, waiting.pop((row["dataset"], row["shard"])))
    if waiting:
        raise RunError(f"embed: shards ended without all of their parts: {sorted(waiting)[:5]}")
    return seconds / max(1, pairs)


def _finish(dataset: Dataset, accounting: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """All parts of a shard are written: count its pairs, write its quarantine table, then its accounting."""
    rows = [(q.pop("stage"), Quarantined(**q)) for part in parts for q in json.loads(part["quarantined"])]
    rows.sort(key=lambda row: (row[1].index, row[1].reason))
    accounting["embedded"] = sum(part["embedded"] for part in parts)
    for _, row in rows:
        accounting["quarantined"][row.reason] = accounting["quarantined"].get(row.reason, 0) + 1
    if accounting["pairs"] != accounting["embedded"] + len(rows):
        raise RunError(
            f"{accounting['shard']}: {accounting['pairs']} pairs, {accounting['embedded']} embedded, {len(rows)} quarantined"
        )
    url = dataset.quarantine_url(accounting["shard"])
    if rows or storage.exists(url):  # a shard that was mended has an empty table
        storage.write_bytes(url, tables.parquet_bytes(tables.quarantine_table(accounting["shard"], rows)))
    storage.write_bytes(dataset.accounting_url(accounting["shard"]), tables.json_bytes(accounting))


class ReadParts:
    """One shard in, its decoded parts out, a fixed number of consecutive keys each; the last one carries the accounting."""

    def __init__(self, limits: Embed, preprocess: dict[str, Any]):
        self.limits, self.preprocess = limits, preprocess

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Rows for `EmbedPart`."""
        torch.set_num_threads(1)
        source = storage.Object(row["url"], row["size"], row["etag"])
        resize = towers.resize_transform(self.preprocess)
        contents, pairs, part = Contents(), 0, 0
        good: list[Pair] = []
        bad: list[Quarantined] = []
        position = 0
        with storage.local_copy(source) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            for group in groups(file, contents):
                if pairs and pairs % self.limits.part_size == 0:
                    at = min(m.offset for m in group.members.values())
                    yield _part(row, part, good, bad, at - position)
                    position, part, good, bad = at, part + 1, [], []
                pairs += 1
                pair = read_pair(file, group, row["shard"], row["caption"], self.limits, resize)
                if contents.broken:  # the last group before the break: nobody can say that it is all there
                    pair = Quarantined(group.index, pair.key, pair.uid, "truncated_shard", contents.broken)
                (good if isinstance(pair, Pair) else bad).append(pair)  # type: ignore[arg-type]
        if contents.broken and not pairs:  # not a tar at all: at least one pair is missing
            pairs = 1
            bad.append(Quarantined(0, "", "", "truncated_shard", contents.broken))
        accounting = Accounting(
            row["shard"],
            source.size,
            source.etag,
            digest,
            contents.members,
            contents.ignored,
            pairs,
            0,
            {},
            part + 1,
            contents.broken,
        )
        yield _part(row, part, good, bad, source.size - position, accounting)


def _part(
    source: dict[str, Any], part: int, good: list[Pair], bad: list[Quarantined], size: int, accounting: Accounting | None = None
) -> dict[str, Any]:
    """A row for the actors. Plain bytes: a part's shape differs from the next one's."""
    return {
        "dataset": source["dataset"],
        "shard": source["shard"],
        "part": part,
        "bytes": size,
        "pixels": b"".join(p.pixels.tobytes() for p in good),
        "shape": list(good[0].pixels.shape) if good else [0, 0, 0],
        "pairs": json.dumps([[p.index, p.key, p.uid, p.caption] for p in good]),
        "quarantined": json.dumps([asdict(q) | {"stage": "read"} for q in bad]),
        "accounting": json.dumps(accounting._asdict()) if accounting else "",
    }


class EmbedPart:
    """Actor: the model's features of a part, written as one Parquet object."""

    def __init__(self, folders: list[str], model: Model):
        self.device = device()
        self.towers = towers.load(model.name, model.checkpoint).to(self.device)
        self.folders = folders

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embed and write one part; returns what the driver counts."""
        shape = [int(n) for n in row["shape"]]
        pixels = (
            np.frombuffer(row["pixels"], np.uint8).reshape(-1, *shape) if row["pixels"] else np.empty((0, 3, 1, 1), np.uint8)
        )
        pairs = [Pair(i, key, uid, text, p) for (i, key, uid, text), p in zip(json.loads(row["pairs"]), pixels, strict=True)]
        started = time.perf_counter()
        images, texts = self._features(pixels, [p.caption for p in pairs])
        seconds = time.perf_counter() - started
        finite: NDArray[np.bool_] = np.isfinite(images).all(1) & np.isfinite(texts).all(1)  # type: ignore[assignment]
        bad = [
            Quarantined(p.index, p.key, p.uid, "non_finite_features", "") for p, ok in zip(pairs, finite, strict=True) if not ok
        ]
        table = tables.features_table([p for p, ok in zip(pairs, finite, strict=True) if ok], images[finite], texts[finite])
        url = storage.join(self.folders[row["dataset"]], row["shard"], tables.part_name(row["part"]))
        storage.write_bytes(url, tables.parquet_bytes(table))
        quarantined = json.loads(row["quarantined"]) + [asdict(q) | {"stage": "embed"} for q in bad]
        return {
            "dataset": row["dataset"],
            "shard": row["shard"],
            "bytes": row["bytes"],
            "embedded": int(finite.sum()),
            "seconds": seconds,
            "quarantined": json.dumps(quarantined),
            "accounting": row["accounting"],
        }

    def _features(self, pixels: NDArray[np.uint8], captions: list[str]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        size = FORWARD_BATCH[self.device.type]
        images, texts = [], []
        for i in range(0, len(captions), size):
            images.append(self.towers.image_features(torch.tensor(pixels[i : i + size]).to(self.device)).half().cpu().numpy())
            texts.append(self.towers.text_features(captions[i : i + size]).half().cpu().numpy())
        if not captions:
            d_x, d_t = self.towers.heads.image.shape[0], self.towers.heads.text.shape[0]
            return np.empty((0, d_x), np.float16), np.empty((0, d_t), np.float16)
        return np.concatenate(images), np.concatenate(texts)
