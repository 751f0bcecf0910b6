"""Which pairs are in which batch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ecif.permutation import permutation


def batches(counts: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The pairs of every batch: epoch after epoch in a random order, cut into batches.

    Args:
        counts: [N] int, how often a pair is in an epoch. 0 leaves it out.
        size: pairs in a batch, B.
        steps: number of batches.
        seed: of the orders.

    Returns:
        `steps` times [B] int64. A batch goes on into the next epoch, so every batch is full and no pair is left out.

    Raises:
        ValueError: no pair has a count.
    """
    epoch = torch.arange(len(counts)).repeat_interleave(counts.long())
    if not len(epoch):
        raise ValueError("no pair is left to train on")
    waiting, number = epoch[:0], 0
    for _ in range(steps):
        while len(waiting) < size:
            waiting = torch.cat([waiting, epoch[permutation(len(epoch), "epoch", number, seed)]])
            number += 1
        yield waiting[:size]
        waiting = waiting[size:]
