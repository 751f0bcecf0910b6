"""Find where the best pairs end, exactly, by counting. Memory does not grow with the number of pairs.

The rank of a pair is a key: some unsigned words, the most significant one first. Lower keys are better. A pass over all keys
counts the next DIGIT bits of those that begin as the edge does, and so learns these bits of the edge (radix selection). Groups
of pairs have an edge each; all of them are found in the same passes.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DIGIT = 16  # bits of a key that one pass learns: two passes learn a float32
COUNTS = 22  # bits of the most counts at once, of all groups together: 32 MB
Words = NDArray[np.uint64]


class Keys(NamedTuple):
    """The keys of n pairs."""

    words: list[Words]  # of each word, [n]
    group: NDArray[np.int64]  # [n]


class Edges(NamedTuple):
    """The last keys that are kept, one for each of G groups. Of equal keys at the edge the earlier ones are kept."""

    words: list[Words]  # of each word, [G]; the words of a key that follow are of no account
    most: NDArray[np.int64]  # [G] how many keys that equal the edge are kept at most

    def kept(self, parts: Iterable[Keys]) -> Iterable[NDArray[np.bool_]]:
        """Which pairs are kept, for each part of them."""
        left = self.most.copy()
        for keys in parts:
            before, equal = np.zeros(len(keys.group), bool), np.ones(len(keys.group), bool)
            for word, edge in zip(keys.words, self.words, strict=True):
                before |= equal & (word < edge[keys.group])
                equal &= word == edge[keys.group]
            at = np.flatnonzero(equal)
            at = at[np.argsort(keys.group[at], kind="stable")]
            groups, starts, counts = np.unique(keys.group[at], return_index=True, return_counts=True)
            place = np.arange(len(at)) - np.repeat(starts, counts)  # among the equal ones of its group
            before[at[place < left[keys.group[at]]]] = True
            left[groups] = np.maximum(left[groups] - counts, 0)
            yield before


def find_edges(read: Callable[[int], Iterable[Keys]], widths: list[int], count: NDArray[np.int64]) -> Edges:
    """The edges of the lowest keys of each group.

    Args:
        read: gives the keys of all pairs, in parts; of each only the first words, as many as it is asked for. A call a pass.
        widths: bits of each word.
        count: [G] how many keys of each group are kept, at most those that it has.
    """
    groups = len(count)
    digit = max(1, min(DIGIT, COUNTS - (groups - 1).bit_length()))
    every, left = np.arange(groups), count.copy()
    words: list[Words] = []
    for level, bits in enumerate(widths):
        low = np.zeros(groups, np.uint64)  # the word of each edge, as far as it is known
        while bits:
            shift = max(0, bits - digit)
            counts = np.zeros((groups, 1 << (bits - shift)), np.int64)
            for keys in read(level + 1):
                above = keys.words[level] - low[keys.group]  # of a word below, this wraps and is large
                inside = above <= np.uint64((1 << bits) - 1)
                for word, edge in zip(keys.words[:level], words, strict=True):
                    inside &= word == edge[keys.group]
                digits = (above[inside] >> np.uint64(shift)).astype(np.int64)
                np.add.at(counts.reshape(-1), keys.group[inside] * counts.shape[1] + digits, 1)
            upto = counts.cumsum(1)
            bucket = (upto < left[:, None]).sum(1)
            in_bucket = counts[every, bucket]
            left -= upto[every, bucket] - in_bucket
            low += bucket.astype(np.uint64) << np.uint64(shift)
            bits = shift
            if ((in_bucket == left) | (left == 0)).all():  # all that is in a bucket is kept, or nothing of its group
                last = np.where(left > 0, low + np.uint64((1 << bits) - 1), np.uint64(0))
                return Edges([*words, last], left)
        words.append(low)
    return Edges(words, left)
