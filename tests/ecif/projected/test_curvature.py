"""The Gauss-Newton matrix in a projected space, its sum in fixed point, and what it answers."""

import pytest
import torch

from ecif.heads import embed
from ecif.heads.curvature import gauss_newton_product, loss_gradient
from ecif.heads.influence import score
from ecif.projected.curvature import CurvatureSum, damped, gauss_newton
from ecif.projected.gradients import project_batch
from tests.support.problems import random_features
from tests.support.projected import BATCHES, HEADS, IDENTITY, PAIRS, PROJECTIONS, RANDOM, SIZE, indexed, matrix_of, seen


@pytest.mark.parametrize("name", PROJECTIONS)
def test_curvature_is_the_projected_gauss_newton_matrix(name):
    r = matrix_of(PROJECTIONS[name])
    products = gauss_newton_product(HEADS, PAIRS, BATCHES, torch.eye(SIZE, dtype=torch.float64))
    _, curvature = indexed(PROJECTIONS[name])
    assert torch.allclose(curvature, r.T @ products @ r, rtol=1e-11, atol=1e-12)


def test_full_rank_index_answers_a_new_question_as_solving_it_does():
    (positive, negative), curvature = indexed(IDENTITY)
    new_images, new_texts = random_features(5, seed=8)
    target = loss_gradient(HEADS, [embed(HEADS, new_images, new_texts)])[None]
    explicit = gauss_newton_product(HEADS, PAIRS, BATCHES, torch.eye(SIZE, dtype=torch.float64))
    q = torch.linalg.solve(explicit + 3 * torch.eye(SIZE, dtype=torch.float64), target[0])[None]
    scores = score(HEADS, PAIRS, BATCHES, q)
    answer = damped(curvature, 3.0).influence(positive + negative, IDENTITY.apply(HEADS, target))
    assert torch.allclose(answer, scores.positive + scores.negative, rtol=1e-8)


def test_merged_curvature_has_the_same_bytes_in_every_order_and_tree():
    parts = []
    for seed in range(8):
        pairs = embed(HEADS, *random_features(6, seed))
        batch = project_batch(HEADS, pairs, RANDOM)
        parts.append(CurvatureSum.of(gauss_newton(batch), 6))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    halves = [parts[7].merge(parts[2]).merge(parts[5]), parts[0].merge(parts[6]).merge(parts[1].merge(parts[4]))]
    tree = halves[1].merge(parts[3]).merge(halves[0])
    assert torch.equal(whole.units, tree.units)
    assert whole.pairs == tree.pairs == 48
    assert whole.matrix().numpy().tobytes() == tree.matrix().numpy().tobytes()
    floats = sum(part.matrix() for part in parts)
    assert torch.equal(whole.matrix(), torch.as_tensor(floats))  # small sums are exact in float64 too


def test_fixed_point_is_as_good_as_its_last_bit():
    exact = gauss_newton(seen(BATCHES[0], RANDOM))
    for bits in (10, 24, 40):
        stored = CurvatureSum.of(exact, 6, bits).matrix()
        assert (stored - exact).abs().max() <= 1.0001 * 2.0 ** -(bits + 1)
        assert torch.equal(stored, stored.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**38])
def test_curvature_that_does_not_fit_is_an_error(value):
    with pytest.raises(ValueError, match=r"not finite or above 2.38: use unit features"):
        CurvatureSum.of(torch.eye(3) * value, 6)
    half = CurvatureSum.of(torch.eye(3) * 2.0**37, 6)
    with pytest.raises(ValueError, match="12 pairs is above"):
        half.merge(half)


def test_curvatures_that_do_not_belong_together_are_an_error():
    with pytest.raises(ValueError, match="same projection"):
        CurvatureSum.of(torch.eye(3), 6).merge(CurvatureSum.of(torch.eye(4), 6))
    with pytest.raises(ValueError, match="same projection"):
        CurvatureSum.of(torch.eye(3), 6).merge(CurvatureSum.of(torch.eye(3), 6, 20))


def test_self_influence_is_the_diagonal_of_the_pairwise_influence():
    (positive, negative), curvature = indexed(RANDOM)
    gradients, solver = positive + negative, damped(curvature, 0.1)
    pairwise = solver.influence(gradients, gradients)
    assert torch.allclose(pairwise, pairwise.T)
    assert torch.allclose(solver.self_influence(gradients), pairwise.diagonal())
    explicit = torch.linalg.solve(curvature + 0.1 * torch.eye(RANDOM.size, dtype=torch.float64), gradients.T).T
    assert torch.allclose(solver.solve(gradients), explicit)
    assert torch.allclose(pairwise, gradients @ explicit.T)


def test_influence_is_the_sum_of_its_parts():
    (positive, negative), curvature = indexed(RANDOM)
    solver, query = damped(curvature, 0.1), torch.ones(1, RANDOM.size)
    parts = solver.influence(positive, query) + solver.influence(negative, query)
    assert torch.allclose(solver.influence(positive + negative, query), parts)


def test_a_matrix_that_is_not_positive_definite_says_what_to_do():
    singular = torch.ones(3, 3)
    with pytest.raises(ValueError, match="not positive definite: raise the damping"):
        damped(singular, 0.0)
    assert damped(singular, 0.1).cholesky.isfinite().all()
    with pytest.raises(ValueError, match="not positive definite"):
        damped(torch.eye(3) * float("nan"), 0.1)
    with pytest.raises(ValueError, match="cannot be below 0"):
        damped(torch.eye(3), -1.0)
