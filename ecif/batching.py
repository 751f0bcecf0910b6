"""Batches, whose pairs share a softmax, and folds, which fits leave out: pure functions of names, counts and a seed."""

import hashlib
from abc import ABC, abstractmethod
from heapq import heappop, heappush
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ecif.permutation import permutation
from ecif.registry import Kind

# The most logits, all directions together, that are computed as one tensor: what a core's cache holds, or what fills a GPU.
ENTRIES = {"cpu": 2**16, "cuda": 2**25}


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

    def sizes(self, shard: str, pairs: int) -> list[int]:
        """Pairs of each batch of `of`, without a repeat. A rule that can tell without forming the batches should."""
        return [len(rows) for rows in self.of(shard, pairs)]


class Shuffled(Batching, name="shuffled"):
    """A seeded permutation of the shard's pairs, cut into batches, see `cut`."""

    def of(self, shard: str, pairs: int, repeat: int = 0) -> list[Tensor]:
        """The batches of a shard in one repeat."""
        return cut(permutation(pairs, "batch", shard, self.seed, repeat), self.size) if pairs else []

    def sizes(self, shard: str, pairs: int) -> list[int]:
        """Pairs of each batch of `of`."""
        return cut_sizes(pairs, self.size)


def cut(rows: Tensor, size: int) -> list[Tensor]:
    """Rows in their order, cut into batches. A last batch smaller than half of `size`, or of one, joins the one before it."""
    return list(rows.split(cut_sizes(len(rows), size)))


def cut_sizes(rows: int, size: int) -> list[int]:
    """Rows of each batch of `cut`."""
    sizes = [size] * (rows // size) + ([rows % size] if rows % size else [])
    if len(sizes) > 1 and (2 * sizes[-1] < size or sizes[-1] < 2):
        sizes[-2:] = [sum(sizes[-2:])]
    return sizes


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

    The work grows with the number of batches, the memory with the size of the sample.

    Args:
        pairs: number of usable pairs of each shard, by the shard's name.
        batches: the rule that forms batches.
        limit: the most pairs to sample.

    Returns:
        By shard, the numbers of its chosen batches in order. Shards without a chosen batch are left out.
    """
    nearest: list[tuple[int, str, int, int]] = []  # a heap of what may be chosen, the largest hash first
    total, bound = 0, b"\xff" * 9
    for shard, count in pairs.items():
        for i, size in enumerate(batches.sizes(shard, count)):
            digest = hashlib.blake2b(f"{batches.seed} {shard} {i}".encode(), digest_size=8).digest()
            if digest > bound:
                continue
            heappush(nearest, (-int.from_bytes(digest), shard, i, size))
            total += size
            while total - nearest[0][-1] > limit:  # those of smaller hash reach the limit without it
                total -= heappop(nearest)[-1]
            if total > limit:
                bound = (-nearest[0][0]).to_bytes(8)
    chosen: dict[str, list[int]] = {}
    total = 0
    for _, shard, i, size in sorted(nearest, key=lambda batch: (-batch[0], *batch[1:])):
        if total + size > limit and chosen:
            break
        total += size
        chosen.setdefault(shard, []).append(i)
    return {shard: sorted(numbers) for shard, numbers in chosen.items()}


def folds(uids: list[str], count: int, seed: int) -> Tensor:
    """[N] int16: the fold of each pair, by a hash of its uid and the seed. It is the same in every shard and run."""
    digest = (hashlib.blake2b(f"{seed} {uid}".encode(), digest_size=8).digest() for uid in uids)
    return torch.tensor([int.from_bytes(d, "little") % count for d in digest], dtype=torch.int16)
