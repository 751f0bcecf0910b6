"""Batches, whose pairs share a softmax, and folds, which fits leave out: pure functions of names, counts and a seed."""

import hashlib
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ecif.permutation import permutation
from ecif.registry import Kind


class Batching(Kind, ABC):
    """A rule that forms batches of a shard's pairs. The pairs of a batch share a softmax.

    Batches are formed within a shard, so that the results for a shard do not depend on which other shards there are.

    Args:
        size: number of pairs in a batch.
        seed: seed of the run.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed

    @abstractmethod
    def of(self, shard: str, pairs: int, repeat: int = 0) -> list[Tensor]:
        """The batches of a shard in one repeat, int64: every row from 0 to `pairs` - 1 is in one batch."""


class Shuffled(Batching, name="shuffled"):
    """A seeded permutation of the shard's pairs, cut into batches, see `cut`."""

    def of(self, shard: str, pairs: int, repeat: int = 0) -> list[Tensor]:
        """The batches of a shard in one repeat."""
        return cut(permutation(pairs, "batch", shard, self.seed, repeat), self.size) if pairs else []


def cut(rows: Tensor, size: int) -> list[Tensor]:
    """Rows in their order, cut into batches. A last batch smaller than half of `size`, or of one, joins the one before it."""
    batches = list(rows.split(size))
    if len(batches) > 1 and (2 * len(batches[-1]) < size or len(batches[-1]) < 2):
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


class Stack(NamedTuple):
    """Some batches that are computed as one tensor."""

    rows: Tensor  # [n, B] of the pairs of each batch
    there: Tensor | None  # [n, B] bool: which places have a pair; None if all have

    def to(self, device: torch.device) -> "Stack":
        """The same on another device."""
        return Stack(self.rows.to(device), None if self.there is None else self.there.to(device))


def stacks(batches: list[Tensor], entries: int, filler: int | None = None) -> list[Stack]:
    """Consecutive batches, put together. Empty ones are left out.

    Args:
        batches: rows of each batch.
        entries: the most numbers n B^2 of a stack. A larger batch has one of its own.
        filler: the row of the places that smaller batches leave. Without it only batches of one size share a stack.
    """
    groups, largest = list[list[Tensor]](), 0
    for rows in (rows for rows in batches if len(rows)):
        fits = groups and (len(groups[-1]) + 1) * max(largest, len(rows)) ** 2 <= entries
        if fits and (filler is not None or len(rows) == largest):
            groups[-1].append(rows)
            largest = max(largest, len(rows))
        else:
            groups.append([rows])
            largest = len(rows)
    return [_stack(group, -1 if filler is None else filler) for group in groups]


def _stack(batches: list[Tensor], filler: int) -> Stack:
    if len({len(batch) for batch in batches}) == 1:
        return Stack(torch.stack(batches), None)
    rows = pad_sequence(batches, batch_first=True, padding_value=filler)
    return Stack(rows, rows != filler)


def mean_by_pair(rows: Tensor, values: Tensor, pairs: int) -> Tensor:
    """[..., N] mean of each pair's values, NaN for a pair without any. The order of summation is fixed on every device.

    Args:
        rows: [M] the pair of each value.
        values: [..., M].
        pairs: N.
    """
    rows, order = rows.sort(stable=True)
    count = rows.bincount(minlength=pairs)
    occurrence = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    table = values.new_zeros(*values.shape[:-1], pairs, int(count.max()) if pairs else 0)
    table[..., rows, occurrence] = values[..., order]
    return table.sum(-1) / count


def choose_batches(pairs: dict[str, int], batches: Batching, limit: int) -> dict[str, list[int]]:
    """Sample batches of a corpus: those with the smallest hashes until `limit` pairs are reached, and at least one.

    Args:
        pairs: number of usable pairs of each shard, by the shard's name.
        batches: the rule that forms batches.
        limit: the most pairs to sample.

    Returns:
        By shard, the numbers of its chosen batches in order. Shards without a chosen batch are left out.
    """
    candidates = []
    for shard, count in pairs.items():
        for i, rows in enumerate(batches.of(shard, count)):
            digest = hashlib.blake2b(f"{batches.seed} {shard} {i}".encode(), digest_size=8).digest()
            candidates.append((digest, shard, i, len(rows)))
    chosen: dict[str, list[int]] = {}
    total = 0
    for _, shard, i, size in sorted(candidates):
        if total + size > limit and chosen:
            break
        total += size
        chosen.setdefault(shard, []).append(i)
    return {shard: sorted(numbers) for shard, numbers in chosen.items()}


def folds(uids: list[str], count: int, seed: int) -> Tensor:
    """[N] int16: the fold of each pair, by a hash of its uid and the seed. It is the same in every shard and run."""
    digest = (hashlib.blake2b(f"{seed} {uid}".encode(), digest_size=8).digest() for uid in uids)
    return torch.tensor([int.from_bytes(d, "little") % count for d in digest], dtype=torch.int16)
