"""The sample: the pairs that heads are fitted on and directions are solved on. It is whole batches, chosen by hash."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.batching import Batching
from ecif.copies import Copies, find_copies, pair_ids
from ecif.sample import Sample
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.batches import batches_of
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder.contents import sampled
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.workers.cluster import Resources
from pipeline.workers.shards import in_tasks

FEW = 16  # shards that the driver reads sooner than other processes start


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


def read_sampled(dataset: Dataset, config: Config, resources: Resources | None = None) -> Sampled:
    """Read the sample of a corpus: all batches if they fit into `fit.sample` pairs, else those of smallest hash.

    Features are in half precision, as they are stored.

    Args:
        dataset: the corpus.
        config: of the run.
        resources: of the tasks that read the shards of a large sample. Without them, threads of this process read all shards.

    Raises:
        RunError: the corpus has too few usable pairs for the folds.
    """
    done = dataset.accounting()
    chosen = sampled(config, done, config.fit.sample)
    asked = [(dataset.features_folder(name), done[name], chosen[name], batches_of(config)) for name in sorted(chosen)]
    if resources is not None and len(asked) > FEW:  # only the chosen rows come to this process
        shards = list(in_tasks("read the sample", _read, asked, resources, together=1))
    else:
        shards = list(storage.in_threads(_read, asked))
    pairs = sum(len(shard.uids) for shard in shards)
    if pairs < 2 * config.fit.folds:
        raise RunError(
            f"only {pairs} usable pairs in the corpus; {config.fit.folds} folds need at least {2 * config.fit.folds}"
        )
    return Sampled(
        torch.from_numpy(np.concatenate([shard.images for shard in shards])),
        torch.from_numpy(np.concatenate([shard.texts for shard in shards])),
        [uid for shard in shards for uid in shard.uids],
        torch.cat([pair_ids(shard.name, torch.tensor(shard.position)) for shard in shards]),
        [size for shard in shards for size in shard.sizes],
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


class _OfShard(NamedTuple):
    """The sampled pairs of a shard, batch after batch, as arrays, because the processes of a node share those."""

    name: str
    images: NDArray[np.float16]  # [n, d_x]
    texts: NDArray[np.float16]  # [n, d_t]
    uids: list[str]
    position: NDArray[np.int32]  # [n] index in the tar
    sizes: list[int]  # pairs of each batch


def _read(asked: tuple[str, Accounting, list[int], Batching]) -> _OfShard:
    folder, accounting, chosen, batches = asked
    features = tables.read_features(folder, accounting.parts)
    of_shard = batches.of(accounting.shard, accounting.embedded)
    rows = torch.cat([of_shard[i] for i in chosen]).numpy()
    return _OfShard(
        accounting.shard,
        features.images[rows],
        features.texts[rows],
        [features.uid[n] for n in rows.tolist()],
        features.position[rows],
        [len(of_shard[i]) for i in chosen],
    )
