"""Conjugate gradient and the largest eigenvalue in a few vectors, on the Gauss-Newton matrix of two small perceptrons."""

import pytest
import torch

from ecif.forward.mode import gauss_newton_product
from ecif.solve import conjugate_gradient, krylov, largest_eigenvalue
from tests.support.perceptrons import BATCHES, PERCEPTRONS, explicit_gauss_newton, perceptrons, product, target_gradients


def test_it_stops_at_the_stated_residual_and_says_how_far_it_came():
    gradients = target_gradients()
    for tolerance in (1e-1, 1e-4):
        solution = conjugate_gradient(product, gradients, 0.3, tolerance=tolerance)
        left = gradients - product(solution.directions) - 0.3 * solution.directions
        assert torch.allclose(solution.residual, left.norm(dim=1) / gradients.norm(dim=1), rtol=1e-6)
        assert (solution.residual <= tolerance).all()
    short = conjugate_gradient(product, gradients, 0.3, tolerance=1e-4, max_iterations=2)
    assert short.iterations == 2 < solution.iterations
    assert (short.residual > 1e-4).any()


def test_a_system_is_solved_alike_alone_and_beside_others_and_as_krylov_solves_it():
    gradients = torch.cat([target_gradients(), torch.eye(1, 69, dtype=torch.float64)])
    together = conjugate_gradient(product, gradients, 1.0, tolerance=1e-9)
    alone = torch.cat([conjugate_gradient(product, g[None], 1.0, tolerance=1e-9).directions for g in gradients])
    assert torch.allclose(together.directions, alone)
    others, _ = krylov(product, gradients, 69).solve(torch.ones(3))
    assert torch.allclose(together.directions, others, rtol=1e-6, atol=1e-9)


def test_wrong_calls_of_the_solver_are_errors():
    once = iter(BATCHES)
    with pytest.raises(ValueError, match="not a generator"):
        conjugate_gradient(lambda v: gauss_newton_product(perceptrons, PERCEPTRONS, once, v), target_gradients(), 1.0)
    with pytest.raises(ValueError, match="above 0"):
        conjugate_gradient(product, target_gradients(), 0.0)
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="zero or not finite"):
            conjugate_gradient(product, target_gradients() * bad, 1.0)


def test_a_damping_of_each_systems_own():
    gradients = target_gradients()
    together = conjugate_gradient(product, gradients, torch.tensor([0.3, 30.0]), tolerance=1e-9)
    alone = [
        conjugate_gradient(product, g[None], d, tolerance=1e-9).directions for g, d in zip(gradients, (0.3, 30.0), strict=True)
    ]
    assert torch.allclose(together.directions, torch.cat(alone))


def test_the_largest_eigenvalue_is_the_explicit_matrixs():
    top = torch.linalg.eigvalsh(explicit_gauss_newton(perceptrons, PERCEPTRONS, BATCHES))[-1]
    assert torch.allclose(largest_eigenvalue(product, target_gradients()), top, rtol=0.03)
    assert torch.allclose(largest_eigenvalue(product, target_gradients(), 60), top, rtol=1e-9)  # past exhaustion
