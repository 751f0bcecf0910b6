"""Stage `score`: influence columns, shard by shard; a pure function of a shard's features, the heads and the directions."""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ecif.columns.agreement import agreement_with
from ecif.columns.misalignment import evidence
from ecif.heads import embed
from ecif.heads.influence import score as score_pairs
from pipeline import storage
from pipeline.config import Config
from pipeline.console import say
from pipeline.corpus import sidecar
from pipeline.corpus.batches import batch_numbers, folds, segment
from pipeline.run_folder import tables
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.filter import read_ranking
from pipeline.stages.fit.stage import as_features, read_heads
from pipeline.stages.losses import loss_of
from pipeline.stages.solve.second_order import Corrector
from pipeline.stages.solve.stage import read_directions
from pipeline.workers.cluster import Resources, device
from pipeline.workers.shards import over_shards

HIGH_LEVERAGE = 0.5  # from here on a pair makes up at least half of some direction's curvature


class Left(NamedTuple):
    """Where the stages before left what scores a pair: URLs."""

    heads: str
    directions: str
    filter: str | None  # None for no such column
    second_order: str | None  # None for the first order


def score(folder: str, dataset: Dataset, left: Left, config: Config, resources: Resources) -> float | None:
    """Write the columns of every shard that has none yet below `folder`.

    Args:
        folder: of the columns.
        dataset: the corpus's features.
        left: by the stages before.
        config: of the run.
        resources: of the actors.

    Returns:
        Seconds of computation a pair; None if there was nothing to do.
    """
    rows = over_shards("score", folder, dataset, ScoreShard, (folder, dataset, left, config), resources)
    if not rows:
        return None
    pairs = sum(row["pairs"] for row in rows)
    if left.second_order is not None:
        high = sum(row["high_leverage"] for row in rows)
        say(f"score    {high / pairs:.1%} of the pairs have a leverage above {HIGH_LEVERAGE:g}")
    return sum(row["seconds"] for row in rows) / pairs


class ScoreShard:
    """Actor: the columns of a shard, written as one Parquet object."""

    def __init__(self, folder: str, dataset: Dataset, left: Left, config: Config):
        self.device = device()
        self.heads = [[h.to(self.device) for h in seeds] for seeds in read_heads(left.heads).folds]
        self.directions = read_directions(left.directions)
        self.moves, self.bank = self.directions.folds.to(self.device), self.directions.bank.to(self.device)
        self.ranking = read_ranking(left.filter) if left.filter else None
        self.correct = Corrector(left.second_order, config.score.negative, self.device) if left.second_order else None
        self.folder, self.dataset, self.targets, self.config = folder, dataset, list(config.targets), config

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score and write one shard; returns what the driver counts."""
        features = tables.read_features(self.dataset.features_folder(row["shard"]), int(row["parts"]))
        started = time.perf_counter()
        fold = folds(features.uid, self.config.fit.folds, self.config.seed)
        recorded, batches = self._batches(row["shard"], len(features.uid))
        columns = self._columns(features, fold, batches)
        seconds = time.perf_counter() - started
        identity = {
            "shard": [row["shard"]] * len(features.uid),
            "index": features.position,
            "key": features.key,
            "uid": features.uid,
            "batch": recorded,
            "fold": fold,
        }
        url = storage.join(self.folder, f"{row['shard']}.parquet")
        table = tables.scores_table(identity, columns)
        if self.dataset.sidecars:
            for name, column in sidecar.columns(self.dataset.sidecars, row["shard"], features.key).items():
                table = table.append_column(name, column)
        storage.write_bytes(url, tables.parquet_bytes(table))
        high = int((columns["leverage"] > HIGH_LEVERAGE).sum()) if self.correct else 0
        return {"pairs": len(features.uid), "seconds": seconds, "high_leverage": high}

    def _batches(self, shard: str, pairs: int) -> tuple[NDArray[np.int32], list[torch.Tensor]]:
        """The batch that each pair had in the fit, and the batches of all repeats."""
        repeats = [segment(pairs, self.config.batch_size, shard, self.config.seed, r) for r in range(self.config.repeats)]
        return batch_numbers(repeats[0]), [torch.from_numpy(rows).to(self.device) for batches in repeats for rows in batches]

    def _columns(
        self, features: tables.Features, fold: NDArray[np.int16], batches: list[torch.Tensor]
    ) -> dict[str, NDArray[np.float32]]:
        """Every pair scored by the heads that did not see its fold, mean over seeds and checkpoints."""
        images, texts = as_features(features.images, self.device), as_features(features.texts, self.device)
        count = len(self.targets)
        sums = np.zeros((2 * count + 2, len(fold)), np.float32)
        added = np.zeros((2 * count + 1, len(fold)), np.float32)
        for f, seeds in enumerate(self.heads):
            mine = fold == f
            for s, heads in enumerate(seeds):
                pairs = embed(heads, images, texts)
                scores = score_pairs(heads, pairs, batches, self.moves[f, s], loss_of(self.config))
                rows = torch.cat([scores.positive, scores.negative]).cpu().numpy()
                sums[:-2, mine] += rows[:, mine] / len(seeds)
                if (s + 1) % self.config.fit.checkpoints == 0:  # influence is of the whole fit, these are of its end
                    rows = torch.stack([scores.pair_loss, scores.clip_score]).cpu().numpy()
                    sums[-2:, mine] += rows[:, mine] / self.config.fit.seeds
                if self.correct:
                    parts = self.correct(f, s, heads, pairs, batches, torch.from_numpy(mine).to(self.device))
                    added += torch.cat([*parts[:2], parts[2][None]]).cpu().numpy() / len(seeds)
        positive, negative, held_out_loss, clip_score = sums[:count], sums[count:-2], sums[-2], sums[-1]
        agreement = agreement_with(self.bank, images, texts, torch.from_numpy(fold).to(self.device)).cpu().numpy()
        # Of the first order, as the sample is that both were learned from.
        seen = evidence(*map(torch.from_numpy, (held_out_loss, clip_score, agreement, positive + negative)))
        misaligned = self.directions.misalignment.probability(seen).float().numpy()
        filters = {}
        if self.ranking:
            filters = dict(zip(self.targets, self.ranking.scores(misaligned, positive + negative), strict=True))
        positive, negative, leverage = positive + added[:count], negative + added[count:-1], added[-1]
        columns = {"clip_score": clip_score, "held_out_loss": held_out_loss, "agreement": agreement}
        for i, name in enumerate(self.targets):
            columns[f"influence_positive_{name}"] = positive[i]
            columns[f"influence_negative_{name}"] = negative[i]
            columns[f"influence_{name}"] = positive[i] + negative[i]
        columns["misalignment"] = misaligned
        columns |= {f"filter_{name}": rank for name, rank in filters.items()}
        return columns | ({"leverage": leverage} if self.correct else {})
