"""Stage `score`: influence columns, shard by shard; a pure function of a shard's features, the heads and the directions."""

import time
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from ecif.heads import embed
from ecif.influence import score as score_pairs
from pipeline import storage, tables
from pipeline.cluster import Resources, device
from pipeline.config import Config
from pipeline.dataset import Dataset
from pipeline.fit import as_features, read_heads
from pipeline.progress import Stage
from pipeline.shards import folds, segment
from pipeline.solve import Directions, read_directions

INFLUENCE_WEIGHT = 0.5  # of the influence's rank beside the held-out loss's in `misalignment`


def score(
    folder: str, dataset: Dataset, heads_url: str, directions_url: str, config: Config, resources: Resources
) -> float | None:
    """Write the columns of every shard that has none yet below `folder`.

    Args:
        folder: of the columns.
        dataset: the corpus's features.
        heads_url: where `fit` left the heads.
        directions_url: where `solve` left the directions.
        config: of the run.
        resources: of the actors.

    Returns:
        Seconds of computation a pair; None if there was nothing to do.
    """
    seconds = 0.0
    done = dataset.accounting()
    there = scored_shards(folder)
    todo = [a for a in done.values() if a.embedded and a.shard not in there]
    total = sum(a.embedded for a in done.values())
    with Stage("score", total, total - sum(a.embedded for a in todo)) as progress:
        if not todo:
            return None
        rows = [{"shard": a.shard, "parts": a.parts} for a in todo]
        shards = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            ScoreShard,
            fn_constructor_args=(folder, dataset, heads_url, directions_url, config),
            compute=ray.data.ActorPoolStrategy(size=min(resources.workers, len(todo))),
            **resources.actor,
        )
        for row in shards.iter_rows():
            progress.advance(row["pairs"])
            seconds += row["seconds"]
    return seconds / max(1, sum(a.embedded for a in todo))


def scored_shards(folder: str) -> set[str]:
    """Names of the shards whose columns are written below `folder`."""
    return {
        item.url.partition(f"/{folder.rsplit('/', 1)[-1]}/")[2].removesuffix(".parquet")
        for item in storage.listing(folder, ".parquet")
    }


class ScoreShard:
    """Actor: the columns of a shard, written as one Parquet object."""

    def __init__(self, folder: str, dataset: Dataset, heads_url: str, directions_url: str, config: Config):
        self.device = device()
        self.heads = [[h.to(self.device) for h in seeds] for seeds in read_heads(heads_url).folds]
        self.directions = read_directions(directions_url)
        self.moves = self.directions.folds.to(self.device)
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
        storage.write_bytes(url, tables.parquet_bytes(tables.scores_table(identity, columns)))
        return {"pairs": len(features.uid), "seconds": seconds}

    def _batches(self, shard: str, pairs: int) -> tuple[NDArray[np.int32], list[torch.Tensor]]:
        """The batch that each pair had in the fit, and the batches of all repeats."""
        repeats = [segment(pairs, self.config.batch_size, shard, self.config.seed, r) for r in range(self.config.score.repeats)]
        recorded = np.empty(pairs, np.int32)
        for i, rows in enumerate(repeats[0]):
            recorded[rows] = i
        return recorded, [torch.from_numpy(rows).to(self.device) for batches in repeats for rows in batches]

    def _columns(
        self, features: tables.Features, fold: NDArray[np.int16], batches: list[torch.Tensor]
    ) -> dict[str, NDArray[np.float32]]:
        """Every pair scored by the heads that did not see its fold, mean over seeds."""
        images, texts = as_features(features.images, self.device), as_features(features.texts, self.device)
        count = len(self.targets)
        sums = np.zeros((2 * count + 2, len(fold)), np.float32)
        for f, seeds in enumerate(self.heads):
            mine = fold == f
            for s, heads in enumerate(seeds):
                scores = score_pairs(heads, embed(heads, images, texts), batches, self.moves[f, s], self.config.score.negative)
                rows = torch.cat([scores.positive, scores.negative, scores.pair_loss[None], scores.clip_score[None]])
                sums[:, mine] += rows.cpu().numpy()[:, mine] / len(seeds)
        positive, negative, held_out_loss, clip_score = sums[:count], sums[count:-2], sums[-2], sums[-1]
        columns = {"clip_score": clip_score, "held_out_loss": held_out_loss}
        for i, name in enumerate(self.targets):
            columns[f"influence_positive_{name}"] = positive[i]
            columns[f"influence_negative_{name}"] = negative[i]
            columns[f"influence_{name}"] = positive[i] + negative[i]
        columns["misalignment"] = misalignment(held_out_loss, positive + negative, self.directions)
        return columns


def misalignment(
    held_out_loss: NDArray[np.float32], influence: NDArray[np.float32], directions: Directions
) -> NDArray[np.float32]:
    """How little a pair's image and caption belong together, 0 to 1: the ranks of its loss and of its harm, 1 : 0.5.

    Ranks are taken through the empirical distribution of the fitted sample, so that a shard's column depends on no other shard.

    Args:
        held_out_loss: [N].
        influence: [T, N]; with several targets their ranks are averaged.
        directions: holds the sample's quantiles.
    """
    rank = _rank(held_out_loss, directions.held_out_loss)
    harm = np.mean([1 - _rank(i, q) for i, q in zip(influence, directions.influence, strict=True)], axis=0)
    return ((rank + INFLUENCE_WEIGHT * harm) / (1 + INFLUENCE_WEIGHT)).astype(np.float32)


def _rank(values: NDArray[np.float32], quantiles: torch.Tensor) -> NDArray[np.float64]:
    known = quantiles.numpy()
    return np.interp(values.astype(np.float64), known, np.linspace(0, 1, len(known)))
