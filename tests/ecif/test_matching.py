"""The matching loss against a loop over its definition, and what it is for: wrong pairs and confidence do not rule it."""

import math

import pytest
import torch

from ecif.matching import matching


def batches(wrong: float, scale: float = 8.0, seed: int = 0, pairs: int = 64) -> list[torch.Tensor]:
    """Logits of four batches in which a share of the pairs have swapped their captions."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(4):
        rows = torch.arange(pairs)
        bad = torch.randperm(pairs, generator=g)[: round(wrong * pairs)]
        rows[bad] = rows[bad.roll(1)]
        found.append(scale * (torch.randn(pairs, pairs, generator=g) * 0.3 + torch.eye(pairs))[rows])
    return found


def slow(similarities: list[torch.Tensor], e: float, tau: float) -> float:
    terms = []
    for s in similarities:
        for n in range(len(s)):
            for line in (s[n], s[:, n]):
                weights = [math.exp(tau * x) for x in line.tolist()]
                terms.append(-math.log((1 - e) * weights[n] / sum(weights) + e / len(s)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_it_is_the_least_of_a_loop_over_shares_and_temperatures(wrong):
    some = [s[:12, :12] for s in batches(wrong)[:2]] + [batches(wrong, seed=1)[0][:7, :7]]
    found = matching(some)
    grid = [slow(some, e / 50, math.exp(x / 10)) for e in range(50) for x in range(-27, 28)]
    assert found.loss <= min(grid) + 1e-6
    assert found.loss == pytest.approx(min(grid), abs=0.01)
    assert found.chance == pytest.approx((24 * math.log(12) + 7 * math.log(7)) / 31)


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.4])
def test_the_share_of_wrong_pairs_is_found(wrong):
    assert matching(batches(wrong)).wrong == pytest.approx(wrong, abs=0.06)


def test_confidence_and_a_bias_of_all_logits_change_nothing():
    plain = matching(batches(0.2))
    assert matching([5 * s - 3 for s in batches(0.2)]).loss == pytest.approx(plain.loss, abs=1e-4)


def test_worse_matching_loses_more_where_the_mean_loss_prefers_it():
    """Heads of little confidence have the smaller mean loss of all pairs, as wrong pairs cost them less."""
    good, flat = batches(0.4, scale=20.0), [s / 6 + 0.4 * torch.randn(s.shape) for s in batches(0.4, scale=20.0)]
    plain = lambda some: sum(s.logsumexp(1).mean() - s.diagonal().mean() for s in some)  # noqa: E731
    assert plain(flat) < plain(good)
    assert matching(flat).loss > matching(good).loss


def test_heads_that_know_nothing_are_at_chance():
    g = torch.Generator().manual_seed(1)
    found = matching([torch.randn(64, 64, generator=g) for _ in range(4)])
    assert found.loss == pytest.approx(found.chance, rel=0.01)
