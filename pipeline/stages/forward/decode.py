"""Decode accepted pairs again: forward mode runs the whole model on their pixels, which no stage stores."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.captions import find_pairs
from pipeline.corpus.images import Resize
from pipeline.corpus.pairs import Pair, ReadingRules, read_pair
from pipeline.corpus.shards import Shard
from pipeline.corpus.tar import Contents, read_groups
from pipeline.errors import RunError
from pipeline.run_folder import tables
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Reading

DECODERS = 4  # threads of an actor; they decode a batch while another one is in the model


class Members(NamedTuple):
    """Some accepted pairs of one shard."""

    shard: Shard
    position: NDArray[np.int32]  # [B] index in the tar
    uid: list[str]

    def take(self, rows: NDArray[np.int64]) -> "Members":
        """The pairs at `rows`, in that order."""
        return Members(self.shard, self.position[rows], [self.uid[i] for i in rows])


class Decoded(NamedTuple):
    """Decoded pairs, resized and not yet normalised."""

    pixels: NDArray[np.uint8]  # [B, 3, H, W]
    captions: list[str]


def accepted(dataset: Dataset, shard: Shard, parts: int) -> Members:
    """Every pair of a shard that has features, in the order of the tar."""
    features = tables.read_features(dataset.features_folder(shard.name), parts)
    return Members(shard, features.position, features.uid)


def decode(batches: list[Members], reading: Reading, config: Config, preprocess: dict[str, Any]) -> Iterator[Decoded]:
    """Decode batch after batch by the rules of `embed`. It holds a local copy of one shard and the pixels of two batches.

    Args:
        batches: each is within one shard. The batches of a shard follow each other.
        reading: how members of the shards become pairs with captions.
        config: of the run. Its limits apply.
        preprocess: of the model.

    Raises:
        RunError: a pair is not what `embed` accepted, because its shard has changed since.
    """
    for shard, of_shard in groupby(batches, key=lambda batch: batch.shard):
        yield from _decode(shard, list(of_shard), reading, config, Resize(preprocess, config.embed.resize))


def _decode(shard: Shard, batches: list[Members], reading: Reading, config: Config, resize: Resize) -> Iterator[Decoded]:
    """Yield the batches of one shard. The next batch is decoded while the caller works on this one."""
    wanted = {i for batch in batches for i in batch.position.tolist()}
    with storage.local_copy(shard.source, storage.ATTEMPTS) as file, ThreadPoolExecutor(DECODERS) as pool:
        rules = ReadingRules(shard.name, reading, config.embed, resize)
        groups = find_pairs(file, read_groups(file, Contents(), reading.key), reading, config.embed)
        members = {group.index: group for group in groups if group.index in wanted}

        def read(index: int, uid: str) -> Pair:
            with open(file.name, "rb") as own:  # threads share `file`, and each needs a position of its own
                pair = index in members and read_pair(own, members[index], rules)
            if not isinstance(pair, Pair) or pair.uid != uid:
                raise RunError(f"{shard.source.url}: pair {index} is not what `embed` read: the shard has changed; run again")
            return pair

        ahead = [pool.map(read, batch.position.tolist(), batch.uid) for batch in batches[:1]]
        for following in [*batches[1:], None]:
            if following:
                ahead.append(pool.map(read, following.position.tolist(), following.uid))
            pairs = list(ahead.pop(0))
            yield Decoded(np.stack([p.pixels.transpose(2, 0, 1) for p in pairs]), [p.caption for p in pairs])
