"""Stage `embed`: shards in, features out. The only stage that touches images: decode once, ask many questions."""

import hashlib
import json
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from ecif import towers
from pipeline import storage
from pipeline.config import Embed, Model
from pipeline.console import say
from pipeline.corpus.pairs import Pair, Quarantined
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.stages.embed.budget import Budget
from pipeline.stages.embed.read import ReadParts
from pipeline.workers.cluster import Resources, device
from pipeline.workers.progress import Stage
from pipeline.workers.shards import as_tasks

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
        RunError: a shard that can't be read, more bad pairs than the budget allows, or counts that do not add up.
    """
    budgets = [Budget(dataset, limits) for dataset in datasets]
    rows, total = [], 0
    for i, dataset in enumerate(datasets):
        done = dataset.forget_changed()
        total += sum(shard.source.size for shard in dataset.shards)
        for accounting in done.values():
            budgets[i].spend(accounting)
        todo = [shard for shard in dataset.shards if shard.name not in done]
        reading = {"dataset": i, "caption": dataset.caption, "classes": json.dumps(dataset.classes)}
        for s in todo:
            uids = json.dumps(dataset.uids_from(s.name))
            rows.append({**reading, "shard": s.name, **s.source._asdict(), "sidecar": uids})
    left = sum(row["size"] for row in rows)
    seconds, pairs = 0.0, 0
    with Stage("embed", total, total - left) as progress:
        if not rows:
            _settle(budgets)
            return None
        parts = (
            as_tasks(rows)
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
                parts_of_shard = waiting.pop((row["dataset"], row["shard"]))
                budgets[row["dataset"]].spend(_finish(datasets[row["dataset"]], finished, parts_of_shard))
    if waiting:
        raise RunError(f"embed: shards ended without all of their parts: {sorted(waiting)[:5]}")
    _settle(budgets)
    return seconds / max(1, pairs)


def _settle(budgets: list[Budget]) -> None:
    for budget in budgets:
        budget.settle()


def _finish(dataset: Dataset, accounting: dict[str, Any], parts: list[dict[str, Any]]) -> Accounting:
    """All parts of a shard are written: count its pairs, write its quarantine table, then its accounting."""
    rows = [(q.pop("stage"), Quarantined(**q)) for part in parts for q in json.loads(part["quarantined"])]
    rows.sort(key=lambda row: (row[1].index, row[1].reason))
    accounting["embedded"] = sum(part["embedded"] for part in parts)
    for _, row in rows:
        accounting["quarantined"][row.reason] = accounting["quarantined"].get(row.reason, 0) + 1
    if rows:
        listed = json.dumps([[row.index, row.reason] for _, row in rows])
        accounting["unusable"] = hashlib.sha256(listed.encode()).hexdigest()
    done = Accounting(**accounting)
    if done.pairs != done.embedded + len(rows):
        raise RunError(f"{done.shard}: {done.pairs} pairs, {done.embedded} embedded, {len(rows)} quarantined")
    if done.members != done.in_pairs + done.ignored:
        raise RunError(f"{done.shard}: {done.members} members, {done.in_pairs} in pairs, {done.ignored} ignored")
    if done.successes not in (None, done.pairs):
        say(f"{done.shard}: {done.pairs} pairs in the tar, {done.successes} successes in its _stats.json")
    url = dataset.quarantine_url(done.shard)
    if rows or storage.exists(url):  # a shard that was mended has an empty table
        storage.write_bytes(url, tables.parquet_bytes(tables.quarantine_table(done.shard, rows)))
    names = {tables.part_name(i) for i in range(done.parts)}
    for part in dataset.parts(done.shard):  # a shard that was replaced before it was done may have had more
        if part.rpartition("/")[2] not in names:
            storage.delete(part)
    storage.write_bytes(dataset.accounting_url(done.shard), tables.json_bytes(accounting))
    return done


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
        pairs = [
            Pair(i, key, uid, text, p, label)
            for (i, key, uid, text, label), p in zip(json.loads(row["pairs"]), pixels, strict=True)
        ]
        started = time.perf_counter()
        images, texts = self._features(pixels, [p.caption for p in pairs])
        seconds = time.perf_counter() - started
        finite: NDArray[np.bool_] = np.isfinite(images).all(1) & np.isfinite(texts).all(1)  # type: ignore[assignment]
        bad = [
            Quarantined(p.index, p.key, p.uid, "non_finite_features", "") for p, ok in zip(pairs, finite, strict=True) if not ok
        ]
        good = [p for p, ok in zip(pairs, finite, strict=True) if ok]
        table = tables.features_table(good, images[finite], texts[finite], bool(row["labelled"]))
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
