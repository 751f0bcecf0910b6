import math

import pytest
import torch

from ecif.damping import SOLVED, choose_damping

G = torch.Generator().manual_seed(0)
REMOVED = torch.rand(12, 30, generator=G) < 0.3
TRUE = torch.randn(2, 30, generator=G)
LOSSES = REMOVED.float() @ TRUE.T
INFLUENCE = torch.stack([TRUE + noise * torch.randn(2, 30, generator=G) for noise in (0.0, 0.5, 3.0)])


@pytest.mark.parametrize(
    ("residuals", "best"),
    [([0.0, 0.0, 0.0], 0), ([1.0, 0.0, 0.0], 1), ([2 * SOLVED, SOLVED, 0.0], 1), ([0.9, 0.8, 0.3], 2)],
)
def test_the_best_prediction_among_the_dampings_that_are_solved(residuals, best):
    position, lds = choose_damping(INFLUENCE, REMOVED, LOSSES, residuals)
    assert position == best
    assert lds == sorted(lds, reverse=True)


def test_where_no_refit_changed_a_loss_the_one_that_is_solved_best_is_taken():
    position, lds = choose_damping(INFLUENCE, REMOVED, torch.ones_like(LOSSES), [0.01, 0.001, 1e-9])
    assert position == 2
    assert all(map(math.isnan, lds))
