"""The pairs that heads are fitted on and directions solved on: whole batches of the corpus, chosen by hash."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.corpus.batches import folds, permutation, segment
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting

READERS = 16


class Sample(NamedTuple):
    """Features of the sampled pairs, batch after batch."""

    images: NDArray[np.float16]  # [N, d_x]
    texts: NDArray[np.float16]  # [N, d_t]
    fold: NDArray[np.int16]  # [N]
    sizes: list[int]  # pairs of each batch; batches are consecutive rows

    def batches(self, repeat: int = 0) -> list[NDArray[np.int64]]:
        """The rows of each batch; in another repeat, of batches of these sizes that all pairs are dealt to anew."""
        rows = permutation(len(self.fold), "repeat", repeat) if repeat else np.arange(len(self.fold))
        return np.split(rows, np.cumsum(self.sizes)[:-1])

    def partners(self) -> NDArray[np.int64]:
        """[N] For every pair another one of its fold, in a ring: whose caption it gets where swaps are planted."""
        partner = np.arange(len(self.fold))
        for f in np.unique(self.fold):
            mine = np.flatnonzero(self.fold == f)
            order = mine[permutation(len(mine), "partners", int(f))]
            partner[order] = np.roll(order, 1)
        return partner


def draw(dataset: Dataset, config: Config) -> Sample:
    """Read the sample of a corpus: every batch while they fit `fit.sample` pairs, else the batches of smallest hash.

    Raises:
        RunError: too few usable pairs to fit anything.
    """
    done = dataset.accounting()
    chosen = choose_batches(done, config, config.fit.sample)
    with ThreadPoolExecutor(READERS) as pool:
        shards = list(pool.map(lambda name: _read(dataset, done[name], chosen[name], config), sorted(chosen)))
    batches = [batch for shard in shards for batch in shard]
    pairs = sum(len(batch.fold) for batch in batches)
    if pairs < 2 * config.fit.folds:
        raise RunError(
            f"only {pairs} usable pairs in the corpus; {config.fit.folds} folds need at least {2 * config.fit.folds}"
        )
    return Sample(
        np.concatenate([b.images for b in batches]),
        np.concatenate([b.texts for b in batches]),
        np.concatenate([b.fold for b in batches]),
        [len(b.fold) for b in batches],
    )


def read_all(dataset: Dataset) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Every pair of a small dataset (a target), shard after shard, in the order of the tars: images, texts."""
    shards = _every_shard(dataset)
    return np.concatenate([s.images for s in shards]), np.concatenate([s.texts for s in shards])


def read_uids(dataset: Dataset) -> list[str]:
    """The uids of `read_all`'s rows."""
    return [uid for shard in _every_shard(dataset) for uid in shard.uid]


def read_labels(dataset: Dataset) -> NDArray[np.int32] | None:
    """The classes of `read_all`'s rows, where the dataset has classes."""
    labels = [shard.labels for shard in _every_shard(dataset) if shard.labels is not None]
    return np.concatenate(labels) if labels else None


def _every_shard(dataset: Dataset) -> list[tables.Features]:
    done = dataset.accounting()
    return [tables.read_features(dataset.features_folder(s.name), done[s.name].parts) for s in dataset.shards]


def choose_batches(done: dict[str, Accounting], config: Config, limit: int) -> dict[str, list[int]]:
    """Batch numbers to take from each shard: those of smallest hash while they fit `limit` pairs, at least one."""
    candidates = []
    for name, accounting in done.items():
        for i, rows in enumerate(segment(accounting.embedded, config.batch_size, name, config.seed)):
            digest = hashlib.blake2b(f"{config.seed} {name} {i}".encode(), digest_size=8).digest()
            candidates.append((digest, name, i, len(rows)))
    chosen: dict[str, list[int]] = {}
    pairs = 0
    for _, name, i, size in sorted(candidates):
        if pairs + size > limit and chosen:
            break
        pairs += size
        chosen.setdefault(name, []).append(i)
    return chosen


def _read(dataset: Dataset, accounting: Accounting, chosen: list[int], config: Config) -> list[Sample]:
    features = tables.read_features(dataset.features_folder(accounting.shard), accounting.parts)
    fold = folds(features.uid, config.fit.folds, config.seed)
    batches = segment(accounting.embedded, config.batch_size, accounting.shard, config.seed)
    return [Sample(features.images[r], features.texts[r], fold[r], [len(r)]) for r in (batches[i] for i in sorted(chosen))]
