"""The stage `filter`: whose influence a candidate sees, and how a choice that was written ranks every target."""

import numpy as np
import pytest
import torch

from ecif.columns.bank import build
from ecif.columns.misalignment import evidence, learn
from ecif.heads import Heads
from pipeline.config import Filter
from pipeline.stages.filter import Ranking, kept
from pipeline.stages.solve.slices import OutOfSample
from pipeline.stages.solve.stage import Directions

N = 200
G = torch.Generator().manual_seed(0)
BAD = torch.arange(N) % 5 == 0
BANK = build(torch.eye(4), torch.eye(4), torch.arange(4), Heads(torch.eye(4), torch.eye(4), 1.0))


def directions(influence: torch.Tensor | None = None) -> Directions:
    """Of one target: bad pairs have a high loss; influence [1, 2, N] is nothing of that."""
    loss, cosine = 3 + 4 * BAD + torch.randn(N, generator=G), 0.5 - 0.3 * BAD + 0.1 * torch.randn(N, generator=G)
    influence = torch.randn(1, 2, N, generator=torch.Generator().manual_seed(1)) if influence is None else influence
    none = torch.zeros(N)
    planted = evidence(7 + torch.randn(N, generator=G), 0.2 + 0.1 * torch.randn(N, generator=G), none, none[None])
    model = learn(evidence(loss, cosine, none, influence.sum(1)), planted)
    return Directions(torch.zeros(0), model, BANK, OutOfSample(loss, cosine, none, influence), torch.zeros(0), {})


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
