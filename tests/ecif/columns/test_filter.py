"""The order of a filter: places among the quantiles of the sample."""

import numpy as np
import pytest
import torch

from ecif.columns.filter import QUANTILES, best, order, quantiles

N = 400
PROBABILITY = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.997, 1.0])
def test_a_share_is_kept_exactly_and_the_best_of_it(keep):
    scores = order(PROBABILITY, quantiles(PROBABILITY))
    kept = best(scores, keep)
    assert kept.sum() == round(keep * N)
    assert kept.all() or PROBABILITY[kept].max() <= PROBABILITY[~kept].min()


def test_of_equal_pairs_the_first_are_kept():
    assert best(torch.zeros(10), 0.3).nonzero()[:, 0].tolist() == [0, 1, 2]


def test_a_place_is_that_among_the_quantiles():
    grid = np.linspace(0, 1, QUANTILES)
    truth = 1 - np.interp(PROBABILITY, np.quantile(PROBABILITY, grid), grid)
    assert np.allclose(order(PROBABILITY, quantiles(PROBABILITY)), truth, atol=1e-6)


def test_a_pair_is_ranked_alike_in_whatever_shard_it_is():
    scores = order(PROBABILITY, among := quantiles(PROBABILITY))
    assert scores.dtype == torch.float32
    assert torch.equal(order(PROBABILITY[7:9], among), scores[7:9])
    assert order(torch.tensor([-1.0, 2.0]), among).tolist() == [1.0, 0.0]


def test_pairs_that_are_all_alike_are_placed():
    assert order(torch.zeros(N), quantiles(torch.zeros(N))).isfinite().all()
