"""The stage `filter`: what a candidate keeps, who judges it, and what is made of the verdicts."""

import numpy as np
import pytest
import torch

from ecif.columns.agreement import build
from ecif.columns.misalignment import evidence, learn
from pipeline.config import Filter
from pipeline.stages.filter import Ranking, choose, kept
from pipeline.stages.solve.slices import OutOfSample
from pipeline.stages.solve.stage import Directions

N = 200
G = torch.Generator().manual_seed(0)
BAD = torch.arange(N) % 5 == 0
BANK = build(torch.eye(4), torch.eye(4), torch.arange(4))


def directions(influence: torch.Tensor | None = None) -> Directions:
    """Of one target: bad pairs have a high loss; influence [1, 2, N] is nothing of that."""
    loss, cosine = 3 + 4 * BAD + torch.randn(N, generator=G), 0.5 - 0.3 * BAD + 0.1 * torch.randn(N, generator=G)
    influence = torch.randn(1, 2, N, generator=torch.Generator().manual_seed(1)) if influence is None else influence
    none = torch.zeros(N)
    planted = evidence(7 + torch.randn(N, generator=G), 0.2 + 0.1 * torch.randn(N, generator=G), none, none[None])
    model = learn(evidence(loss, cosine, none, influence.sum(1)), planted)
    return Directions(torch.zeros(0), model, BANK, OutOfSample(loss, cosine, none, influence), torch.zeros(0), {})


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.997, 1.0])
def test_a_candidate_keeps_its_budget(keep):
    assert kept(directions(), 0, 0, 0.5, keep).sum() == round(keep * N)


def test_without_influence_the_misaligned_go_first_and_with_nothing_else_the_harmful():
    found = directions()
    assert kept(found, 0, 0, 0.0, 0.8)[BAD.numpy()].sum() < 0.2 * BAD.sum()
    dropped = ~kept(found, 0, 0, 1.0, 0.8)
    harm = found.sample.influence[0, 0].numpy()
    assert harm[dropped].max() <= harm[~dropped].min()


def test_a_candidate_knows_nothing_of_the_half_that_has_not_asked():
    influence = torch.randn(1, 2, N, generator=torch.Generator().manual_seed(1))
    found = directions(influence)
    other = found._replace(sample=found.sample._replace(influence=torch.stack([influence[:, 0], -9 * influence[:, 1]], 1)))
    for weight in (0.0, 0.5, 1.0):
        assert np.array_equal(kept(found, 0, 0, weight, 0.7), kept(other, 0, 0, weight, 0.7))
        assert not np.array_equal(kept(found, 0, 1, weight + 0.01, 0.7), kept(other, 0, 1, weight + 0.01, 0.7))


def chosen(losses: list[list[float]], weights: list[float], keep: list[float], expected: float = 0.8):
    return choose(Filter(weights=weights, keep=keep), expected, 1.0, torch.tensor(losses))


def test_the_budget_is_best_over_all_weights_and_the_weight_best_at_it():
    losses = [[0.90, 0.80, 0.90], [0.70, 0.82, 0.90], [1.10, 0.75, 0.90]]  # the best cell is an exception
    found = chosen(losses, [0.0, 0.5, 1.0], [0.9, 0.8, 0.7])
    assert (found["weight"], found["keep"], found["loss"]) == (1.0, 0.8, pytest.approx(0.75))
    assert found["loss_of_everything"] == 1.0
    assert [(t["weight"], t["keep"]) for t in found["tried"]][3:5] == [(0.5, 0.9), (0.5, 0.8)]


@pytest.mark.parametrize(("expected", "keep"), [(0.93, 0.9), (0.84, 0.8), (0.77, 0.8), (0.5, 0.7)])
def test_of_budgets_that_are_about_alike_the_one_nearest_to_what_is_expected_is_taken(expected, keep):
    found = chosen([[0.780, 0.800, 0.802, 0.806]], [0.0], [0.5, 0.7, 0.8, 0.9], expected)
    assert (found["keep"], found["loss"]) == (0.5, pytest.approx(0.78)), "a budget that is really better is taken"
    found = chosen([[0.810, 0.800, 0.802, 0.806]], [0.0], [0.5, 0.7, 0.8, 0.9], expected)
    assert found["keep"] == keep


def test_of_weights_that_are_alike_the_one_that_trusts_influence_least_is_taken():
    found = chosen([[0.800], [0.807], [0.809]], [1.0, 0.5, 0.0], [0.8])
    assert (found["weight"], found["loss"]) == (0.5, pytest.approx(0.807))


def test_what_gains_next_to_nothing_drops_nothing():
    found = chosen([[0.985, 0.99]], [0.0], [0.9, 0.8])
    assert (found["keep"], found["loss"]) == (1.0, 1.0)
    found = chosen([[0.984, 0.976], [0.978, 0.970]], [0.0, 0.5], [0.9, 0.7], expected=0.92)
    assert (found["weight"], found["keep"]) == (0.0, 0.9), "the best of what is alike gains enough"


def test_a_filter_ranks_a_pair_alike_in_whatever_shard_it_is():
    grid = torch.linspace(0, 1, 1025, dtype=torch.float64)
    ranking = Ranking(grid, torch.stack([4 * grid - 2, grid]), {"a": {"weight": 0.25}, "b": {"weight": 1.0}})
    misalignment, influence = np.float32([0.0, 0.5, 1.0, 0.2]), np.float32([[-2.0, 0.0, 2.0, -5.0], [0.0, 0.1, 0.9, 7.0]])
    scores = ranking.scores(misalignment, influence)
    assert np.allclose(scores, [[0.75, 0.5, 0.25, 0.6], [0.0, 0.1, 0.9, 1.0]], atol=1e-3)
    alone = ranking.scores(misalignment[1:2], influence[:, 1:2])
    assert np.array_equal(alone, scores[:, 1:2])


@pytest.mark.parametrize(
    "wrong", [{"weights": []}, {"weights": [1.5]}, {"keep": [0.0]}, {"keep": [1.0]}, {"keep": []}, {"seeds": 0}]
)
def test_candidates_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        Filter.model_validate(wrong)
