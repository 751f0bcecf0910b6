import math

import pytest
import torch

from ecif.projected.relative import gram, loss_relatif, relative_influence, theta_relatif

G = torch.Generator().manual_seed(0)
PAIRS, K = 6, 9
POSITIVE, NEGATIVE = torch.randn(2, PAIRS, K, generator=G, dtype=torch.float64)
TARGETS = torch.randn(3, K, generator=G, dtype=torch.float64)


def ask(targets, positive, negative):
    return relative_influence(targets @ positive.T, targets @ negative.T, gram(positive, negative))


def test_it_is_the_maximum_over_unit_directions_in_the_plane():
    turn = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    for n in range(PAIRS):
        plane = torch.linalg.qr(torch.stack([POSITIVE[n], NEGATIVE[n]], dim=1)).Q
        directions = plane @ torch.stack([turn.cos(), turn.sin()])
        best = (TARGETS @ directions).abs().amax(1)
        value = ask(TARGETS, POSITIVE, NEGATIVE)[:, n]
        assert torch.allclose(value.abs(), best, rtol=1e-6)
        assert (value.abs() >= best * (1 - 1e-12)).all()


def test_it_is_the_quadratic_form_of_the_pseudo_inverse():
    b = torch.stack([TARGETS @ POSITIVE.T, TARGETS @ NEGATIVE.T], dim=-1)
    inverse = torch.linalg.pinv(gram(POSITIVE, NEGATIVE), hermitian=True)
    form = torch.einsum("tni,nij,tnj->tn", b, inverse, b).sqrt()
    assert torch.allclose(ask(TARGETS, POSITIVE, NEGATIVE).abs(), form)


def test_the_sign_is_that_of_influence_and_the_scale_of_the_parts_does_not_matter():
    value = ask(TARGETS, POSITIVE, NEGATIVE)
    assert torch.equal(value.sign(), (TARGETS @ (POSITIVE + NEGATIVE).T).sign())
    assert torch.allclose(ask(TARGETS, 1e6 * POSITIVE, 1e6 * NEGATIVE), value)
    assert torch.allclose(ask(-TARGETS, POSITIVE, NEGATIVE), -value)
    assert torch.allclose(ask(TARGETS, NEGATIVE, POSITIVE), value)
    assert (value.abs() <= TARGETS.norm(dim=1)[:, None]).all()
    assert torch.allclose(ask(TARGETS[0], POSITIVE, NEGATIVE), value[0])


@pytest.mark.parametrize("factor", [2.0, -0.5, 1.0, 0.0, 1e-9])
def test_parallel_parts_leave_a_line(factor):
    line = (TARGETS @ POSITIVE.T).abs() / POSITIVE.norm(dim=1)
    for parts in ((POSITIVE, factor * POSITIVE), (factor * POSITIVE, POSITIVE)):
        value = ask(TARGETS, *parts)
        assert torch.allclose(value.abs(), line)
        assert torch.equal(value.sign(), (TARGETS @ POSITIVE.T).sign() * math.copysign(1, 1 + factor))


def test_rounding_does_not_turn_a_line_into_a_plane():
    almost = POSITIVE * 0.7 + 1e-12 * NEGATIVE
    line = (TARGETS @ POSITIVE.T).abs() / POSITIVE.norm(dim=1)
    assert torch.allclose(ask(TARGETS, POSITIVE, almost).abs(), line)


def test_a_pair_that_changes_nothing_is_relevant_to_nothing():
    nothing = torch.zeros(PAIRS, K, dtype=torch.float64)
    assert (ask(TARGETS, nothing, nothing) == 0).all()
    influence = TARGETS @ nothing.T
    assert (theta_relatif(influence, nothing) == 0).all()
    assert (loss_relatif(influence, nothing[:, 0]) == 0).all()


def test_relatif_norms_and_that_the_plane_reaches_at_least_the_line():
    curvature = torch.eye(K, dtype=torch.float64) + torch.outer(TARGETS[0], TARGETS[0])
    gradient = POSITIVE + NEGATIVE
    change = torch.linalg.solve(curvature, gradient.T).T
    influence = TARGETS @ change.T
    theta = theta_relatif(influence, change)
    for n in range(PAIRS):
        assert torch.allclose(theta[:, n], influence[:, n] / change[n].square().sum().sqrt())
        own = (gradient[n] @ change[n]).sqrt()
        assert torch.allclose(loss_relatif(influence, (gradient * change).sum(1))[:, n], influence[:, n] / own)
    parts = [torch.linalg.solve(curvature, g.T).T for g in (POSITIVE, NEGATIVE)]
    assert (ask(TARGETS, *parts).abs() >= theta.abs() * (1 - 1e-12)).all()
