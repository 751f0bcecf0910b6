"""The curvature that leaves with a pair, against its definition."""

import torch

from ecif.projected.leaving import LeavingCurvature, RootWeights, solve_in_span
from tests.support.written_out import leaving_curvature, random_batch


def renormalised_curvature(batch, n):
    """The line of H_n that removal_steps leaves out, term by term."""
    rest = batch.without(n)
    kept = [k for k in range(len(batch.logits)) if k != n]
    p, q = batch.logits.softmax(1), batch.logits.softmax(0)
    total = 0
    for r, k in enumerate(kept):
        row = rest.jacobian[r] - rest.row_mean[r]
        column = rest.jacobian[:, r] - rest.column_mean[r]
        total = total + p[k, n] * row.T @ torch.diag(rest.logits.softmax(1)[r]) @ row
        total = total + q[n, k] * column.T @ torch.diag(rest.logits.softmax(0)[:, r]) @ column
    return total


def test_what_leaves_is_the_change_of_the_batch_curvature_up_to_the_renormalisation():
    batch = random_batch()
    whole = batch.curvature()
    for n, leaving in enumerate(leaving_curvature(batch)):
        torch.testing.assert_close(leaving - renormalised_curvature(batch, n), whole - batch.without(n).curvature())


def test_what_is_left_stays_positive_definite():
    for scale in (0.1, 3.0, 30.0):
        batch = random_batch(scale=scale)
        left = batch.curvature() - leaving_curvature(batch)
        assert torch.linalg.eigvalsh(left).min() > -1e-10


def test_adjoint_of_the_factor():
    batch = random_batch()
    curvature = LeavingCurvature.of(batch, RootWeights.of(batch.logits), torch.arange(7))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.einsum("nab,nb->na", leaving_curvature(batch), x)
    torch.testing.assert_close(curvature.adjoint(curvature.factor(x[:, None])[:, 0]), expected)


def test_the_small_system_is_solved_in_float64_whatever_comes_in():
    whole, leaving = torch.eye(3).expand(2, 3, 3), 0.5 * torch.eye(3).expand(2, 3, 3)
    coefficients, leverage = solve_in_span(whole, leaving, 0.95)
    assert coefficients.dtype == torch.float64
    torch.testing.assert_close(coefficients, 2 * torch.eye(3, dtype=torch.float64)[:, :2].expand(2, 3, 2))
    torch.testing.assert_close(leverage, torch.full((2,), 0.5, dtype=torch.float64))
