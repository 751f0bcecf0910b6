"""Seeded permutations that are the same on every machine and with every version of every library."""

import hashlib

import numpy as np
import torch
from torch import Tensor


def permutation(count: int, *key: object) -> Tensor:
    """A permutation of 0..count-1, int64, that depends on `count` and `key` only.

    The raw output of a bit generator is stable across versions of NumPy. Library shuffles need not be stable.
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    return torch.from_numpy(np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable"))
