import math

import pytest
import torch

from ecif.damping import SOLVED, choose_damping

G = torch.Generator().manual_seed(0)
REMOVED = torch.rand(12, 30, generator=G) < 0.3
TRUE = torch.randn(2, 30, generator=G)
LOSSES = REMOVED.float() @ TRUE.T
DAMPINGS = [0.01, 0.1, 1.0]
INFLUENCE = torch.stack([TRUE + noise * torch.randn(2, 30, generator=G) for noise in (0.0, 0.5, 3.0)])


@pytest.mark.parametrize(
    ("residuals", "best"),
    [([0.0, 0.0, 0.0], 0), ([1.0, 0.0, 0.0], 1), ([2 * SOLVED, SOLVED, 0.0], 1), ([0.9, 0.8, 0.3], 2)],
)
def test_the_best_prediction_among_the_dampings_that_are_solved(residuals, best):
    position, lds = choose_damping(INFLUENCE, REMOVED, LOSSES, DAMPINGS, residuals)
    assert position == best
    assert lds == sorted(lds, reverse=True)


@pytest.mark.parametrize(("dampings", "position"), [([0.01, 0.1, 1.0], 2), ([1.0, 0.1, 0.01], 0)])
def test_where_no_refit_changed_a_loss_the_largest_is_taken(dampings, position):
    found, lds = choose_damping(INFLUENCE, REMOVED, torch.ones_like(LOSSES), dampings, [0.0, 0.0, 0.0])
    assert found == position
    assert all(map(math.isnan, lds))
