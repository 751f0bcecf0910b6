"""The sample: the pairs that heads are fitted on and directions are solved on. It is whole batches, chosen by hash."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.copies import Copies, find_copies, pair_ids
from ecif.sample import Sample
from pipeline.config import Config
from pipeline.corpus.batches import batches_of
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder.contents import sampled
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting

READERS = 16


class Sampled(NamedTuple):
    """The sampled pairs, batch after batch, before copies are grouped and the groups are dealt into folds."""

    images: Tensor  # [N, d_x] float16
    texts: Tensor  # [N, d_t] float16
    uids: list[str]
    pair: Tensor  # [N] int64, see `ecif.copies.pair_ids`
    sizes: list[int]  # pairs of each batch

    def find_copies(self, folds: int, seed: int, to: torch.device) -> Copies:
        """Group the copies, on a device. The result is on the CPU."""
        found = find_copies(self.images.to(to), self.texts.to(to), self.uids, self.pair.to(to), folds, seed)
        return found.to("cpu")

    def in_folds(self, copies: Copies) -> Sample:
        """The sample, with the folds of its groups."""
        return Sample(self.images, self.texts, copies.fold, self.sizes, copies.group)


def read_sample(dataset: Dataset, config: Config) -> Sample:
    """The sample of a corpus in its folds. These are found anew, and are those of `group_sample`.

    Raises:
        RunError: the corpus has too few usable pairs for the folds.
    """
    sampled = read_sampled(dataset, config)
    return sampled.in_folds(sampled.find_copies(config.fit.folds, config.seed, torch.device("cpu")))


def read_sampled(dataset: Dataset, config: Config) -> Sampled:
    """Read the sample of a corpus: all batches if they fit into `fit.sample` pairs, else those of smallest hash.

    Features are in half precision, as they are stored.

    Raises:
        RunError: the corpus has too few usable pairs for the folds.
    """
    done = dataset.accounting()
    chosen = sampled(config, done, config.fit.sample)
    with ThreadPoolExecutor(READERS) as pool:
        shards = list(pool.map(lambda name: _read(dataset, done[name], chosen[name], config), sorted(chosen)))
    batches = [batch for shard in shards for batch in shard]
    pairs = sum(len(batch.uids) for batch in batches)
    if pairs < 2 * config.fit.folds:
        raise RunError(
            f"only {pairs} usable pairs in the corpus; {config.fit.folds} folds need at least {2 * config.fit.folds}"
        )
    return Sampled(
        torch.cat([b.images for b in batches]),
        torch.cat([b.texts for b in batches]),
        [uid for b in batches for uid in b.uids],
        torch.cat([b.pair for b in batches]),
        [len(b.uids) for b in batches],
    )


def read_all(dataset: Dataset) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Features of a whole small dataset, images [N, d_x] and texts [N, d_t]: shard after shard, in the order of the tars."""
    shards = _every_shard(dataset)
    return np.concatenate([s.images for s in shards]), np.concatenate([s.texts for s in shards])


def read_uids(dataset: Dataset) -> list[str]:
    """The uids of `read_all`'s rows."""
    return [uid for shard in _every_shard(dataset) for uid in shard.uid]


def read_labels(dataset: Dataset) -> NDArray[np.int32] | None:
    """The classes [N] of `read_all`'s rows; None for a dataset without classes."""
    labels = [shard.labels for shard in _every_shard(dataset) if shard.labels is not None]
    return np.concatenate(labels) if labels else None


def _every_shard(dataset: Dataset) -> list[tables.Features]:
    done = dataset.accounting()
    return [tables.read_features(dataset.features_folder(s.name), done[s.name].parts) for s in dataset.shards]


def _read(dataset: Dataset, accounting: Accounting, chosen: list[int], config: Config) -> list[Sampled]:
    features = tables.read_features(dataset.features_folder(accounting.shard), accounting.parts)
    images, texts = torch.tensor(features.images), torch.tensor(features.texts)
    pair = pair_ids(accounting.shard, torch.tensor(features.position))
    batches = batches_of(config).of(accounting.shard, accounting.embedded)
    return [
        Sampled(images[rows], texts[rows], [features.uid[n] for n in rows.tolist()], pair[rows], [len(rows)])
        for rows in (batches[i] for i in chosen)
    ]
