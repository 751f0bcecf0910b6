"""The order of a filter: misalignment, and influence among pairs that are as near to the target."""

import numpy as np
import pytest
import torch

from ecif.columns.filter import BINS, QUANTILES, ranking

N = 400
G = torch.Generator().manual_seed(0)
NEAR, WORSE = torch.rand(N, generator=G), torch.rand(N, generator=G)
MISALIGNMENT = WORSE.double()
# A target asks about near pairs: there influence is large, and larger for aligned pairs. Of far pairs it knows nothing.
INFLUENCE = NEAR.square() * (10 + 5 * (0.5 - WORSE)) + 0.01 * torch.randn(N, generator=G)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.997, 1.0])
def test_a_share_is_kept_exactly_and_the_best_of_it(keep):
    found = ranking(MISALIGNMENT, INFLUENCE, NEAR, 0.5)
    kept, scores = (of(MISALIGNMENT, INFLUENCE, NEAR, *rest) for of, rest in ((found.keep, [keep]), (found.scores, [])))
    assert kept.sum() == round(keep * N)
    assert kept.all() or scores[kept].min() >= scores[~kept].max()


def test_with_no_weight_the_misaligned_are_dropped():
    stays = ranking(MISALIGNMENT, INFLUENCE, NEAR, 0.0).keep(MISALIGNMENT, INFLUENCE, NEAR, 0.8)
    assert MISALIGNMENT[~stays].min() >= MISALIGNMENT[stays].max()


def test_a_pair_is_compared_with_those_that_are_as_near():
    """A loop over the definition."""
    weight, found = 0.7, ranking(MISALIGNMENT, INFLUENCE, NEAR, 0.7)
    order = NEAR.argsort()
    z, reliability = np.zeros(N), np.zeros(BINS)
    bins = order.tensor_split(BINS)
    for b, rows in enumerate(bins):
        z[rows] = (INFLUENCE[rows].double() - INFLUENCE[rows].double().median()).numpy()
        ranks = [np.argsort(np.argsort(values)) for values in (z[rows], -MISALIGNMENT[rows].numpy())]
        reliability[b] = max(0, np.corrcoef(*ranks)[0, 1])
    reliability /= reliability.max()
    trusted = np.concatenate([np.abs(z[rows]) for b, rows in enumerate(bins) if reliability[b] >= 0.5])
    scale = 1.4826 * torch.tensor(trusted).median().item()
    grid = np.linspace(0, 1, QUANTILES)
    aligned = 1 - np.interp(MISALIGNMENT, np.quantile(MISALIGNMENT, grid), grid)
    truth = np.zeros(N)
    for b, rows in enumerate(bins):
        truth[rows] = aligned[rows] + weight * (1 + reliability[b] * np.tanh(z[rows] / (2 * scale)))
    assert np.allclose(found.scores(MISALIGNMENT, INFLUENCE, NEAR), truth / (1 + 2 * weight), atol=1e-6)


def test_what_the_target_does_not_ask_about_is_not_dropped_for_it():
    """As it would be by a rank of influence over all pairs."""
    far = NEAR.median() > NEAR
    by_rank = INFLUENCE.argsort().argsort() >= 0.3 * N
    kept = ranking(MISALIGNMENT, INFLUENCE, NEAR, 1.2).keep(MISALIGNMENT, INFLUENCE, NEAR, 0.7)
    assert (~by_rank)[far].double().mean() > 0.5
    assert (~kept)[far].double().mean() < 0.3


def test_a_pair_is_ranked_alike_in_whatever_shard_it_is():
    found = ranking(MISALIGNMENT, INFLUENCE, NEAR, 0.5)
    scores = found.scores(MISALIGNMENT, INFLUENCE, NEAR)
    assert scores.dtype == torch.float32
    assert torch.equal(found.scores(MISALIGNMENT[7:9], INFLUENCE[7:9], NEAR[7:9]), scores[7:9])
    assert 0 <= scores.min() <= scores.max() <= 1


@pytest.mark.parametrize("constant", ["influence", "near", "misalignment"])
def test_a_score_that_says_nothing_leaves_the_order_to_the_others(constant):
    values = {"misalignment": MISALIGNMENT, "influence": INFLUENCE, "near": NEAR}
    values[constant] = torch.zeros_like(values[constant])
    scores = ranking(**values, weight=0.5).scores(**values)
    assert scores.isfinite().all()
    if constant == "influence":
        assert torch.equal(scores.argsort(stable=True), ranking(**values, weight=0.0).scores(**values).argsort(stable=True))


def test_a_bin_of_a_few_pairs_does_not_decide_how_much_influence_counts():
    near = torch.ones(N)
    near[:4] = 0.5
    influence = INFLUENCE.clone()
    influence[:4] = 100 * (1 - WORSE[:4])  # by accident, these agree with alignment
    reliability = ranking(MISALIGNMENT, influence, near, 0.5).reliability
    assert reliability[0] == 0
    assert reliability[-1] == 1
