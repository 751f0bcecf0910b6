"""How a run deals the pairs of a shard into batches."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ecif.batching import Batching
from ecif.registry import find_kind
from pipeline.config import Config


def batches_of(config: Config) -> Batching:
    """The rule by which a configuration deals the pairs of a shard into batches."""
    kind = find_kind(Batching, config.batching)  # type: ignore[type-abstract]
    return kind(config.batch_size, config.seed)


def batch_numbers(batches: list[Tensor]) -> NDArray[np.int32]:
    """The number of each pair's batch, [N]."""
    numbers = np.empty(sum(map(len, batches)), np.int32)
    for i, rows in enumerate(batches):
        numbers[rows.numpy()] = i
    return numbers
