"""Soft-cap sampling draws as the paper's loop does, whatever the order of the pairs."""

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.results import soft_cap as sampling
from pipeline.results.soft_cap import soft_cap

SEEDS = 400


def uids(count: int, seed: int = 0) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(16 * count), "S16")


def by_the_paper(logits: np.ndarray, draws: int, penalty: float, batch: int, seed: int) -> np.ndarray:
    """Draw a batch without replacement from the softmax, lower what was drawn, and so on."""
    random, left, counts = np.random.default_rng(seed), draws, np.zeros(len(logits), int)
    while left:
        weights = np.exp(logits - penalty * counts - (logits - penalty * counts).max())
        drawn = random.choice(len(logits), min(batch, left), replace=False, p=weights / weights.sum())
        counts[drawn] += 1
        left -= len(drawn)
    return counts


@pytest.mark.parametrize(("draws", "penalty"), [(5, 0.15), (40, 0.15), (40, 2.0), (13, 0.6)])
@pytest.mark.parametrize("few", [0, 1000])
def test_counts_are_distributed_as_those_of_the_loop(monkeypatch, draws, penalty, few):
    monkeypatch.setattr(sampling, "FEW", few)
    logits = np.array([2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -3.0, 0.2])
    ours = np.array([soft_cap(logits, uids(8, seed), draws, penalty, seed) for seed in range(SEEDS)])
    loop = np.array([by_the_paper(logits, draws, penalty, 1, seed) for seed in range(SEEDS)])
    for of in (lambda counts: counts, lambda counts: counts**2, lambda counts: counts * np.roll(counts, 1, 1)):
        a, b = of(ours), of(loop)
        error = np.sqrt((a.var(0) + b.var(0)) / SEEDS) + 1e-3
        assert (abs(a.mean(0) - b.mean(0)) < 4.5 * error).all()


def test_small_batches_of_the_paper_give_nearly_the_same():
    logits = np.random.default_rng(0).normal(size=300)
    ours = np.mean([soft_cap(logits, uids(300), 240, 0.15, seed) for seed in range(100)], 0)
    loop = np.mean([by_the_paper(logits, 240, 0.15, 3, seed) for seed in range(100)], 0)
    best = np.argsort(logits)
    for tenth in np.array_split(best, 10):
        assert ours[tenth].sum() == pytest.approx(loop[tenth].sum(), rel=0.06, abs=1.5)


@pytest.mark.parametrize("draws", [0, 1, 999, 1001, 5000, 20000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_the_number_of_draws_is_exact(draws, spread):
    logits = spread * np.random.default_rng(0).normal(size=5000)
    counts = soft_cap(logits, uids(5000), draws, 0.15, 0)
    assert counts.sum() == draws
    assert counts.min() >= 0


def test_neither_rounds_nor_chunks_change_what_is_drawn(monkeypatch):
    logits = np.random.default_rng(0).normal(size=3000)
    whole = soft_cap(logits, uids(3000), 4000, 0.15, 0)
    for few, chunk in ((0, 7), (10**9, 1 << 22), (1, 1 << 22)):
        monkeypatch.setattr(sampling, "FEW", few)
        monkeypatch.setattr(sampling, "CHUNK", chunk)
        assert (soft_cap(logits, uids(3000), 4000, 0.15, 0) == whole).all()


def test_the_order_of_the_pairs_does_not_matter_and_the_seed_does():
    logits, names = np.random.default_rng(0).normal(size=3000), uids(3000)
    whole = soft_cap(logits, names, 2500, 0.15, 3)
    order = np.random.default_rng(1).permutation(3000)
    assert (soft_cap(logits[order], names[order], 2500, 0.15, 3) == whole[order]).all()
    assert (soft_cap(logits, names, 2500, 0.15, 4) != whole).any()
    assert (soft_cap(logits + 123.0, names, 2500, 0.15, 3) == whole).all()  # a softmax does not know the level


def test_a_large_penalty_draws_every_pair_as_often():
    logits = np.random.default_rng(0).normal(size=500)
    assert (soft_cap(logits, uids(500), 1500, 100.0, 0) == 3).all()


def test_copies_of_one_pair_share_its_draws_out():
    counts = soft_cap(np.zeros(3000), np.repeat(uids(1), 3000), 2000, 0.15, 0)
    assert counts.tolist() == [1] * 2000 + [0] * 1000


def test_what_has_no_score_is_never_drawn():
    logits = np.array([np.nan, 0.0, np.nan, 1.0])
    counts = soft_cap(logits, uids(4), 50, 0.15, 0)
    assert counts[[0, 2]].tolist() == [0, 0]
    assert counts.sum() == 50


@pytest.mark.parametrize(
    ("logits", "penalty", "said"),
    [
        ([np.nan], 0.15, "no pair can be drawn"),
        ([0.0, np.inf], 0.15, "infinite values"),
        ([0.0], 0.0, "penalty 0.0: a number above 0"),
        ([0.0], np.nan, "a number above 0"),
    ],
)
def test_what_can_not_be_drawn_is_said(logits, penalty, said):
    with pytest.raises(UserError, match=said):
        soft_cap(np.array(logits), uids(len(logits)), 3, penalty, 0)
