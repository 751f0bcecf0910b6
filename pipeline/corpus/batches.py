"""How the pairs of a shard fall into batches and folds: pure functions of names, counts and a seed."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def permutation(pairs: int, *key: object) -> NDArray[np.int64]:
    """A permutation of 0..pairs-1 that depends on nothing but `key`, the same on every machine and version."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    # Raw output of a bit generator is stable across NumPy versions; its shuffles need not be.
    return np.argsort(np.random.PCG64(seed).random_raw(pairs), kind="stable")


def segment(pairs: int, batch_size: int, shard: str, seed: int, repeat: int = 0) -> list[NDArray[np.int64]]:
    """Seg: which of a shard's valid pairs share a softmax, a pure function of its arguments.

    A last batch smaller than half of `batch_size`, or of one pair, joins the one before it.
    """
    order = permutation(pairs, "batch", shard, seed, repeat)
    batches = [order[i : i + batch_size] for i in range(0, pairs, batch_size)]
    if len(batches) > 1 and (2 * len(batches[-1]) < batch_size or len(batches[-1]) < 2):
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def batch_numbers(batches: list[NDArray[np.int64]]) -> NDArray[np.int32]:
    """Of each pair, the number of its batch."""
    numbers = np.empty(sum(map(len, batches)), np.int32)
    for i, rows in enumerate(batches):
        numbers[rows] = i
    return numbers


def folds(uids: list[str], count: int, seed: int) -> NDArray[np.int16]:
    """The fold of each pair, by hash of its identity: the same pair is in the same fold in every shard and run."""
    digest = (hashlib.blake2b(f"{seed} {uid}".encode(), digest_size=8).digest() for uid in uids)
    return np.array([int.from_bytes(d, "little") % count for d in digest], dtype=np.int16)
