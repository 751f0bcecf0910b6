"""The filter of a target: what a candidate keeps, which one is chosen, and how a chosen one ranks the pairs of a shard."""

import numpy as np
import pytest
import torch

from ecif.columns.filter import QUANTILES, Candidate, Choice, Ranking, candidates, choose_candidate, keep_mask, ranking

N = 200
G = torch.Generator().manual_seed(0)
MISALIGNMENT, INFLUENCE = torch.rand(N, generator=G, dtype=torch.float64), torch.randn(N, generator=G)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.997, 1.0])
def test_a_candidate_keeps_its_share(keep):
    assert keep_mask(MISALIGNMENT, INFLUENCE, Candidate(0.5, keep)).sum() == round(keep * N)


@pytest.mark.parametrize(("weight", "badness"), [(0.0, MISALIGNMENT), (1.0, -INFLUENCE)])
def test_without_influence_the_misaligned_are_dropped_and_by_influence_alone_the_harmful(weight, badness):
    stays = keep_mask(MISALIGNMENT, INFLUENCE, Candidate(weight, 0.8))
    assert badness[~stays].min() >= badness[stays].max()


def test_between_them_the_weighted_mean_of_both_ranks_decides():
    stays = keep_mask(MISALIGNMENT, INFLUENCE, Candidate(0.25, 0.7))
    ranks = [
        [sum(float(other) < float(value) for other in values) / (N - 1) for value in values]
        for values in (-MISALIGNMENT, INFLUENCE)
    ]
    fused = [0.75 * a + 0.25 * b for a, b in zip(*ranks, strict=True)]
    assert sorted(torch.nonzero(stays).flatten().tolist()) == sorted(sorted(range(N), key=lambda n: -fused[n])[:140])


def test_candidates_are_everything_and_then_every_weight_with_every_share():
    assert candidates([0.0, 0.5], [0.9, 0.8]) == [(0.0, 1.0), (0.0, 0.9), (0.0, 0.8), (0.5, 0.9), (0.5, 0.8)]


def chosen(losses: list[list[float]], weights: list[float], keep: list[float], aligned: float = 0.8) -> Choice:
    """With a loss of 1 where everything is kept."""
    return choose_candidate(weights, keep, torch.cat([torch.ones(1), torch.tensor(losses).flatten()]), aligned)


def test_the_share_is_best_over_all_weights_and_the_weight_best_at_it():
    losses = [[0.90, 0.80, 0.90], [0.70, 0.82, 0.90], [1.10, 0.75, 0.90]]  # the best cell is an exception
    assert chosen(losses, [0.0, 0.5, 1.0], [0.9, 0.8, 0.7]) == (1.0, 0.8, pytest.approx(0.75))


@pytest.mark.parametrize(("aligned", "keep"), [(0.93, 0.9), (0.84, 0.8), (0.77, 0.8), (0.5, 0.7)])
def test_of_shares_that_are_equally_good_the_one_nearest_to_the_expected_share_is_taken(aligned, keep):
    found = chosen([[0.780, 0.800, 0.802, 0.806]], [0.0], [0.5, 0.7, 0.8, 0.9], aligned)
    assert found == (0.0, 0.5, pytest.approx(0.78)), "a share that is really better is taken"
    assert chosen([[0.810, 0.800, 0.802, 0.806]], [0.0], [0.5, 0.7, 0.8, 0.9], aligned).keep == keep


def test_of_weights_that_are_equally_good_the_one_that_trusts_influence_the_least_is_taken():
    assert chosen([[0.800], [0.807], [0.809]], [1.0, 0.5, 0.0], [0.8]) == (0.5, 0.8, pytest.approx(0.807))


def test_a_gain_of_next_to_nothing_drops_nothing():
    assert chosen([[0.985, 0.99]], [0.0], [0.9, 0.8]) == (0.0, 1.0, 1.0)
    found = chosen([[0.984, 0.976], [0.978, 0.970]], [0.0, 0.5], [0.9, 0.7], aligned=0.92)
    assert found[:2] == (0.0, 0.9), "the best of those that are equally good gains enough"


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_pair_is_ranked_by_interpolation_in_the_sample(weight):
    of_sample = ranking(MISALIGNMENT, INFLUENCE, weight)
    probability, influence = torch.rand(50), 3 * torch.randn(50)
    influence[:2] = of_sample.influence[[0, -1]].float()
    grid = np.linspace(0, 1, QUANTILES)
    aligned = 1 - np.interp(probability.double(), np.quantile(MISALIGNMENT, grid), grid)
    helpful = np.interp(influence.double(), np.quantile(INFLUENCE.double(), grid), grid)
    truth = torch.from_numpy((1 - weight) * aligned + weight * helpful).float()
    found = of_sample.scores(probability, influence)
    assert torch.allclose(found, truth)
    assert found.dtype == torch.float32
    assert torch.equal(of_sample.scores(probability[7:8], influence[7:8]), found[7:8]), "whatever shares its shard"


def test_equal_values_of_the_sample_and_values_outside_of_it_have_a_rank():
    grid = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    of_sample = Ranking(grid, (2 * grid - 1).clamp(-0.5, 0.5), torch.tensor(1.0, dtype=torch.float64))
    values = torch.tensor([-9.0, -0.5, 0.0, 0.5, 9.0])
    assert of_sample.scores(torch.zeros(5), values).tolist() == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert np.interp(values, of_sample.influence, grid).tolist() == [0.0, 0.25, 0.5, 1.0, 1.0]
