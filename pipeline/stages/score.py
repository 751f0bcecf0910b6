"""Stage `score`: the columns of every shard, a pure function of its features, the heads and the directions.

A table holds columns that are computed together: the evidence of a pair, its influence on one target, or one column of
`score.columns`. A table that exists is not computed again, so a further target costs only its own columns.
"""

import json
import threading
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.columns.agreement import agreement_with_target
from ecif.columns.contract import HeldOutPairs, held_out_values
from ecif.columns.evidence import Evidence
from ecif.columns.influence import held_out_influence
from ecif.columns.near import nearness
from ecif.copies import COPIES, Copies, OfPairs, pair_ids
from ecif.directions import Directions
from ecif.heads import Heads, embed
from ecif.heads.cross_fit import FittedHeads
from pipeline import storage
from pipeline.config import Config
from pipeline.console import say
from pipeline.corpus.batches import batch_numbers, batches_of
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.artifacts import Artifacts, keys_of
from pipeline.run_folder.columns import Requested, evidence_scores, requested_columns
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.fit.sample import read_all
from pipeline.stages.fit.stage import as_features
from pipeline.stages.losses import loss_of
from pipeline.stages.solve.second_order import Corrector, Curvature, SecondOrder
from pipeline.workers.cluster import device
from pipeline.workers.run import Run
from pipeline.workers.shards import ShardWorker, missing_tables, over_shards, seconds_a_pair

HIGH_LEVERAGE = 0.5  # a pair with more makes up over half of the curvature along some direction
Columns = dict[str, dict[str, NDArray[np.float32]]]  # [N] each, by table and name


def score(run: Run, start: Heads, corpus: Dataset, targets: dict[str, Dataset]) -> float | None:
    """Write the missing tables of every shard.

    Args:
        run: the run.
        start: the model's own heads.
        corpus: features of the corpus.
        targets: the features of every target.

    Returns:
        Seconds of computation a pair; None if there was nothing to do.
    """
    keys = keys_of("score", run.config)
    missing = missing_tables(run.artifacts, keys)
    todo = {key for of_shard in missing.values() for key in of_shard}
    images = {
        column.target: read_all(targets[column.target])[0]
        for column in requested_columns(run.config)
        if column.target and f"column/{column.name}" in todo
    }
    arguments = (run.config, run.artifacts, corpus.features_folder(""), start, images, sorted(todo))
    rows = over_shards("score", corpus.accounting(), missing, ScoreShard, arguments, run.resources)
    if leverages := [row["high_leverage"] for row in rows if row["high_leverage"] is not None]:
        high = sum(leverages) / sum(row["pairs"] for row in rows)
        say(f"score    {high:.1%} of the pairs have a leverage above {HIGH_LEVERAGE:g}")
    return seconds_a_pair(rows)


class ScoreShard(ShardWorker):
    """Actor: the tables of a shard, each written as one Parquet object.

    It computes one shard at a time. Meanwhile other threads read the next shards, or write those before.

    Args:
        config: of the run.
        artifacts: where the objects of the run are.
        features: folder of the features of all shards.
        start: the model's own heads.
        images: by target, the image features [M, d_x] that columns of `score.columns` compare with.
        keys: of all tables that some shard lacks.
    """

    threads = 8  # a GPU has computed a shard long before storage has sent the next one

    def __init__(
        self, config: Config, artifacts: Artifacts, features: str, start: Heads, images: dict[str, Any], keys: list[str]
    ):
        self.device, self._turn = device(), threading.Lock()
        self.config, self.artifacts, self.features = config, artifacts, features
        self.start, self.loss, self.batches = start.to(self.device), loss_of(config), batches_of(config)
        fitted = tensors.load(artifacts.url("heads"), FittedHeads)
        self.heads = [[h.to(self.device) for h in fits] for fits in fitted.folds]
        self.ends = [[h.to(self.device) for h in ends] for ends in fitted.ends]
        self.bank = tensors.load(artifacts.url("evidence"), Evidence).bank.to(self.device)
        self.copies = tensors.load(artifacts.url("copies"), Copies).to(self.device)
        self.evidence = [kind() for kind in evidence_scores(config)]
        self.columns = {f"column/{column.name}": column for column in requested_columns(config)}
        self.images = {target: as_features(matrix, self.device) for target, matrix in images.items()}
        asked = [target for target in config.targets if f"influence/{target}" in keys]
        found = (tensors.load(artifacts.url(f"directions/{target}"), Directions) for target in asked)
        solved = dict(zip(asked, found, strict=True))
        self.directions = {target: of.folds.to(self.device) for target, of in solved.items()}
        self.captions = {target: of.captions.to(self.device) for target, of in solved.items()}
        self.banks = {target: of.bank.to(self.device) for target, of in solved.items()}
        self.corrected = [target for target in config.targets if f"correction/{target}" in keys]
        if self.corrected:
            curvature = tensors.load(artifacts.url("curvature"), Curvature)
            small = [tensors.load(artifacts.url(f"second_order/{target}"), SecondOrder) for target in self.corrected]
            self.correct = Corrector(curvature, small, config.score.negative, self.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compute and write the missing tables of one shard; returns what the driver counts."""
        shard, keys = row["shard"], json.loads(row["keys"])
        features = tables.read_features(storage.join(self.features, shard), int(row["parts"]))
        device()  # each thread has to be told to compute alone
        with self._turn:
            started = time.perf_counter()
            found, fold = self._compute(shard, features, keys)
            seconds = time.perf_counter() - started
        first = self.batches.of(shard, len(features.uid))
        identity = tables.identity(shard, features, batch_numbers(first), fold)
        for key in keys:  # only `pairs` has all identities: the other tables have the same rows
            table = tables.scores_table(identity if key == "pairs" else {"index": identity["index"]}, found[key])
            storage.write_bytes(self.artifacts.table(key, shard), tables.parquet_bytes(table))
        leverages = [of["leverage"] for of in found.values() if "leverage" in of]
        high = int((np.stack(leverages).max(0) > HIGH_LEVERAGE).sum()) if leverages else None
        return {"pairs": len(features.uid), "seconds": seconds, "high_leverage": high}

    def _compute(self, shard: str, features: tables.Features, keys: list[str]) -> tuple[Columns, NDArray[np.int16]]:
        """The columns of each table, and the fold of each pair."""
        copies = self._copies(shard, features)
        pairs = self._pairs(shard, features, copies.fold)
        found: dict[str, dict[str, Tensor]] = {}
        if "pairs" in keys:
            found["pairs"] = {s.name: held_out_values(s, pairs, self.ends) for s in self.evidence}
            found["pairs"] |= {column.name: getattr(copies, column.name) for column in COPIES}
        found |= self._influence(pairs, keys)
        found |= {key: of for key, of in self._corrections(pairs, keys).items() if key in keys}
        for key in (key for key in keys if key in self.columns):
            found[key] = {self.columns[key].name: self._column(pairs, self.columns[key])}
        columns = {key: {name: values.float().cpu().numpy() for name, values in of.items()} for key, of in found.items()}
        return columns, pairs.fold.cpu().numpy()

    def _copies(self, shard: str, features: tables.Features) -> OfPairs:
        """The fold of each pair, and how many copies of it are in the sample."""
        images, texts = (torch.tensor(side).to(self.device) for side in (features.images, features.texts))
        pair = pair_ids(shard, torch.tensor(features.position)).to(self.device)
        return self.copies.of(images, texts, features.uid, pair)

    def _pairs(self, shard: str, features: tables.Features, fold: Tensor) -> HeldOutPairs:
        """The shard's pairs in the batches of all repeats."""
        count = len(features.uid)
        batches = [rows.to(self.device) for r in range(self.config.repeats) for rows in self.batches.of(shard, count, r)]
        images, texts = as_features(features.images, self.device), as_features(features.texts, self.device)
        return HeldOutPairs(images, texts, fold, batches, self.start, [], self.loss, self.bank)

    def _influence(self, pairs: HeldOutPairs, keys: list[str]) -> dict[str, dict[str, Tensor]]:
        """Both parts of the influence on the targets that are asked for, agreement with their pairs, and nearness to them."""
        asked = [target for target in self.directions if f"influence/{target}" in keys]
        positive, negative = held_out_influence(pairs, self.heads, [self.directions[target] for target in asked])
        found = {}
        for i, target in enumerate(asked):
            found[f"influence/{target}"] = {
                "positive": positive[i],
                "negative": negative[i],
                "agreement": agreement_with_target(self.banks[target], pairs.images, pairs.texts)[0],
                "near": nearness(pairs.texts, self.captions[target], self.bank.text_centre),
            }
        return found

    def _corrections(self, pairs: HeldOutPairs, keys: list[str]) -> dict[str, dict[str, Tensor]]:
        """Second-order corrections of both parts, and leverage.

        Each pair is corrected under the heads that were fitted without its fold; the values are means over those fits.
        """
        if not any(f"correction/{target}" in keys for target in self.corrected):
            return {}
        correction = pairs.images.new_zeros(3, len(self.corrected), len(pairs.fold))
        for f, fits in enumerate(self.heads):
            for s, heads in enumerate(fits):
                embedded = embed(heads, pairs.images, pairs.texts)
                correction += self.correct(f, s, heads, embedded, pairs.batches, pairs.fold == f) / len(fits)
        parts = ("positive", "negative", "leverage")
        found = {t: dict(zip(parts, correction[:, i], strict=True)) for i, t in enumerate(self.corrected)}
        return {f"correction/{target}": of for target, of in found.items()}

    def _column(self, pairs: HeldOutPairs, column: Requested) -> Tensor:
        """One column of `score.columns`, [N]."""
        return held_out_values(column.score(), pairs._replace(target_images=self.images.get(column.target)), self.ends)
