"""A split of a corpus's pairs into batches and folds depends on nothing but names, counts and a seed."""

import hashlib
import random

import numpy as np
import pytest
import torch

from ecif.batching import Batching, Shuffled, choose_batches, folds
from ecif.permutation import permutation

UIDS = [f"{i:032x}" for i in range(1000)]


def test_pinned_values():
    """Another value here means that every batch, fold and so every score of every run changes: a new major version."""
    assert permutation(8, "batch", "00000", 0, 0).tolist() == [1, 0, 6, 3, 4, 2, 5, 7]
    assert [rows.tolist() for rows in Shuffled(4, 7).of("a/00000", 10)] == [[7, 5, 2, 3], [0, 8, 1, 4], [6, 9]]
    assert folds(UIDS[:12], 5, 0).tolist() == [1, 1, 3, 3, 2, 2, 3, 1, 0, 3, 0, 4]


@pytest.mark.parametrize("pairs", [0, 1, 2, 1000])
def test_a_permutation_is_one_and_depends_on_its_key_alone(pairs):
    order = permutation(pairs, "key", 1)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(pairs))
    np.random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(permutation(pairs, "key", 1), order)
    if pairs > 2:
        assert not torch.equal(permutation(pairs, "key", 2), order)


def test_permutations_favour_no_place():
    first = torch.bincount(torch.tensor([permutation(5, "key", i)[0] for i in range(2000)]), minlength=5)
    assert first.min() > 330  # 400 expected


@pytest.mark.parametrize("size", [2, 3, 8, 16, 1000])
@pytest.mark.parametrize("pairs", [*range(35), 256])
def test_batches_are_a_partition_into_batches_of_a_size_near_the_one_asked_for(pairs, size):
    batches = Shuffled(size, 0).of("00000", pairs)
    assert sorted(i for rows in batches for i in rows.tolist()) == list(range(pairs))
    assert all(len(rows) == size for rows in batches[:-1])
    if pairs >= size:
        # A lone last pair joins too, so batches of 2 may end in one of 3.
        assert max(2, size / 2) <= len(batches[-1]) < max(1.5 * size, 4)
    else:
        assert len(batches) == (pairs > 0)


@pytest.mark.parametrize(
    ("size", "pairs", "sizes"),
    [(8, 19, [8, 11]), (8, 20, [8, 8, 4]), (8, 3, [3]), (2, 7, [2, 2, 3]), (2, 1, [1])],
)
def test_a_small_last_batch_joins_the_one_before_it(size, pairs, sizes):
    """No batch holds one pair alone unless the shard does."""
    assert [len(rows) for rows in Shuffled(size, 0).of("00000", pairs)] == sizes


@pytest.mark.parametrize(("shard", "seed", "repeat"), [("00001", 0, 0), ("00000", 1, 0), ("00000", 0, 1)])
def test_batches_change_with_shard_seed_and_repeat(shard, seed, repeat):
    first, other = Shuffled(8, 0).of("00000", 64), Shuffled(8, seed).of(shard, 64, repeat)
    assert [rows.tolist() for rows in other] != [rows.tolist() for rows in first]


CORPUS = {f"{i:05d}": 32 for i in range(30)}


@pytest.mark.parametrize(("limit", "batches"), [(6 * 16, 6), (7 * 16 - 1, 6), (1, 1), (10**6, 60)])
def test_a_sample_holds_as_many_whole_batches_as_fit_and_one_at_least(limit, batches):
    taken = choose_batches(CORPUS, Shuffled(16, 0), limit)
    assert sum(map(len, taken.values())) == batches
    assert all(numbers == sorted(set(numbers)) and set(numbers) <= {0, 1} for numbers in taken.values())


def test_batches_are_sampled_by_hash_whatever_the_order_of_the_shards():
    taken = choose_batches(CORPUS, Shuffled(16, 0), 96)
    assert choose_batches(dict(reversed(CORPUS.items())), Shuffled(16, 0), 96) == taken
    assert choose_batches(CORPUS, Shuffled(16, 1), 96) != taken
    fewer = {shard: count for shard, count in CORPUS.items() if shard in taken}
    assert choose_batches(fewer, Shuffled(16, 0), 96) == taken, "what is not sampled does not matter"


def all_sorted(pairs: dict[str, int], batches: Batching, limit: int) -> dict[str, list[int]]:
    """The sample by its definition: every batch of the corpus listed and sorted by its hash."""
    sizes = {(shard, i): len(rows) for shard, n in pairs.items() for i, rows in enumerate(batches.of(shard, n))}
    key = {(s, i): hashlib.blake2b(f"{batches.seed} {s} {i}".encode(), digest_size=8).digest() for s, i in sizes}
    chosen, total = {}, 0
    for shard, i in sorted(sizes, key=key.__getitem__):
        total += sizes[shard, i]
        if total > limit and chosen:
            break
        chosen.setdefault(shard, set()).add(i)
    return {shard: sorted(numbers) for shard, numbers in chosen.items()}


class Halves(Batching):
    """A rule of one's own, which does not say the sizes of its batches beforehand."""

    def of(self, shard, pairs, repeat=0):
        return [rows for rows in torch.arange(pairs).tensor_split(2) if len(rows)]


@pytest.mark.parametrize("rule", [Shuffled, Halves])
def test_a_sample_is_that_of_all_batches_sorted_by_their_hashes(rule):
    draw = random.Random(0)
    for seed in range(100):
        corpus = {f"{i:03d}": draw.randrange(60) for i in range(draw.randrange(1, 40))}
        batches, limit = rule(draw.choice([2, 3, 8, 16, 100]), seed), draw.choice([1, 2, 10, 50, 200, 10**6])
        assert choose_batches(corpus, batches, limit) == all_sorted(corpus, batches, limit), (corpus, limit)


@pytest.mark.parametrize("rule", [Shuffled, Halves])
def test_sizes_of_batches_are_known_without_forming_them(rule):
    for size in (1, 2, 3, 8, 256):
        for pairs in (0, 1, 2, 5, 11, 12, 13, 600, 1000):
            assert rule(size, 0).sizes("a", pairs) == [len(rows) for rows in rule(size, 0).of("a", pairs)]


def test_folds_are_balanced():
    sizes = torch.bincount(folds([f"{i:032x}" for i in range(5000)], 5, 0).long())
    assert sizes.sum() == 5000
    assert abs(sizes - 1000).max() < 120  # 4 standard deviations


def test_a_pair_is_in_the_same_fold_wherever_it_is_and_changes_it_with_the_seed():
    everywhere = folds(UIDS, 5, 0)
    assert folds(UIDS[::-1], 5, 0).tolist() == everywhere.tolist()[::-1]
    assert folds(UIDS[10:20], 5, 0).tolist() == everywhere.tolist()[10:20]
    same = (everywhere == folds(UIDS, 5, 1)).double().mean()
    assert 0.1 < same < 0.3  # as independent as 5 folds are
