"""The parts of second-order influence against their slow definitions, and at the edges of the numbers."""

import pytest
import torch
from torch.func import grad, jacrev

from ecif.heads import embed
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import identity_projection
from ecif.projected.second_order import RemovalSteps, removal_steps, target_change
from tests.support.problems import flat, random_features, random_heads, slow_logits, slow_loss, without
from tests.support.written_out import Batch, inverse, leaving_curvature, random_batch


def test_a_span_of_all_coordinates_gives_the_factored_step():
    batch = random_batch(size=2)  # two parts span both coordinates
    positive, negative = batch.pair_gradients()
    h = batch.curvature() + torch.eye(2, dtype=torch.float64)
    steps = removal_steps(batch, positive, negative, inverse(h))
    left = h - leaving_curvature(batch)
    torch.testing.assert_close(steps.positive, torch.linalg.solve(left, positive))
    torch.testing.assert_close(steps.negative, torch.linalg.solve(left, negative))
    torch.testing.assert_close(steps.leverage, 1 - torch.linalg.eigvals(torch.linalg.solve(h, left)).real.amin(1))


def test_with_much_damping_the_step_is_the_first_order_one_and_its_error_falls_with_the_square():
    batch = random_batch(size=12)
    positive, negative = batch.pair_gradients()
    errors = []
    for damping in (1e3, 1e4):
        h = batch.curvature() + damping * torch.eye(12, dtype=torch.float64)
        steps = removal_steps(batch, positive, negative, inverse(h))
        torch.testing.assert_close(steps.positive, inverse(h)(positive), rtol=0.1, atol=0.1 / damping)
        exact = torch.linalg.solve(h - leaving_curvature(batch), positive + negative)
        errors.append(((steps.positive + steps.negative - exact).norm() / exact.norm()).item())
    assert errors[1] < 2e-2 * errors[0]  # terms up to H_n exact: what is missing is H_n^2, relative to the step


def test_target_change_is_that_of_a_quadratic_loss():
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    steps = RemovalSteps(randn(3, 4), randn(3, 4), torch.zeros(3))
    gradients, roots = randn(2, 4), randn(2, 4, 4)
    curvatures = roots @ roots.mT
    positive, negative = target_change(steps, gradients, curvatures)
    for t in range(2):
        for n in range(3):
            move = steps.positive[n] + steps.negative[n]
            expected = gradients[t] @ move + move @ curvatures[t] @ move / 2
            torch.testing.assert_close(positive[t, n] + negative[t, n], expected)


def test_the_heads_curvature_without_a_pair():
    """On real cosine heads: what leaves is the change of J^T (d2L/dS2) J when the pair's row and column are deleted."""
    heads, (images, texts) = random_heads(), random_features(5)
    weights = flat(heads)
    jacobian = jacrev(lambda w: slow_logits(heads, w, images, texts))(weights)
    batch = Batch(slow_logits(heads, weights, images, texts), jacobian)
    positive, negative = batch.pair_gradients()
    removed = lambda w, n: slow_loss(s := slow_logits(heads, w, images, texts)) - slow_loss(without(s, n))  # noqa: E731
    torch.testing.assert_close(positive[2] + negative[2], grad(removed)(weights, 2))
    h = batch.curvature() + torch.eye(heads.size, dtype=torch.float64)
    steps = removal_steps(batch, positive, negative, inverse(h))
    left = h - leaving_curvature(batch)
    exact = torch.linalg.solve(left, positive + negative)
    # Three directions out of 65: better than the first order's, in the norm that the step minimises.
    error = lambda step: torch.einsum("na,nab,nb->n", step - exact, left, step - exact)  # noqa: E731
    assert (error(steps.positive + steps.negative) < 0.1 * error(inverse(h)(positive + negative))).all()
    # The index's batches, which form no Jacobian, give the same steps.
    projected = project_batch(heads, embed(heads, images, texts), identity_projection(heads))
    for a, b in zip(removal_steps(projected, *pair_gradients(projected), inverse(h)), steps, strict=True):
        torch.testing.assert_close(a, b)


def test_a_confident_wrong_pair_gives_finite_steps_in_float32():
    batch = random_batch(scale=1.0)
    batch.logits[1, 4] += 200.0  # P_14 = 1 to the last bit
    positive, negative = batch.pair_gradients()
    h = batch.curvature() + torch.eye(6, dtype=torch.float64)
    double = removal_steps(batch, positive, negative, inverse(h))
    single = removal_steps(batch.to(torch.float32), positive.float(), negative.float(), inverse(h))
    assert single.positive.dtype == torch.float32
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def test_parallel_and_zero_parts():
    batch = random_batch()
    positive, negative = batch.pair_gradients()
    h = batch.curvature() + torch.eye(6, dtype=torch.float64)
    steps = removal_steps(batch, positive, negative, inverse(h))
    both = removal_steps(batch, positive + negative, torch.zeros_like(negative), inverse(h))
    doubled = removal_steps(batch, positive, 2 * positive, inverse(h))
    torch.testing.assert_close(doubled.negative, 2 * doubled.positive)
    assert (both.negative == 0).all()
    # Less to choose from, still the same direction of effect.
    assert torch.nn.functional.cosine_similarity(both.positive, steps.positive + steps.negative).min() > 0.9
    nothing = torch.zeros_like(positive)
    still = removal_steps(batch, nothing, nothing, inverse(h))
    assert all((part == 0).all() for part in still)


def test_leverage_is_capped_where_more_curvature_leaves_than_there_is():
    batch = random_batch()
    positive, negative = batch.pair_gradients()
    little = 1e-3 * torch.eye(6, dtype=torch.float64)  # an H that has never seen this batch
    steps = removal_steps(batch, positive, negative, inverse(little), max_leverage=0.9)
    assert (steps.leverage > 1).all()
    first = inverse(little)(positive + negative)
    assert ((steps.positive + steps.negative).norm(dim=1) <= 10.001 * first.norm(dim=1)).all()
    uncapped = removal_steps(batch, positive, negative, inverse(batch.curvature() + 5 * little), max_leverage=0.999)
    assert (uncapped.leverage < 1).all()
    none = removal_steps(batch, positive, negative, inverse(little), max_leverage=0.0)
    torch.testing.assert_close(none.positive, inverse(little)(positive))


def test_pairs_are_taken_in_chunks_without_a_difference(monkeypatch):
    batch = random_batch()
    positive, negative = batch.pair_gradients()
    solve = inverse(batch.curvature() + torch.eye(6, dtype=torch.float64))
    whole = removal_steps(batch, positive, negative, solve)
    monkeypatch.setattr("ecif.projected.second_order.ENTRIES_AT_ONCE", 3 * 2 * 7 * 6)
    for a, b in zip(removal_steps(batch, positive, negative, solve), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_say_what_is_wrong():
    batch = random_batch()
    positive, negative = batch.pair_gradients()
    with pytest.raises(ValueError, match="do not fit"):
        removal_steps(batch, positive[:3], negative[:3], lambda g: g)
    with pytest.raises(ValueError, match="one pair"):
        removal_steps(Batch(batch.logits[:1, :1], batch.jacobian[:1, :1]), positive[:1], negative[:1], lambda g: g)
    with pytest.raises(ValueError, match="max_leverage"):
        removal_steps(batch, positive, negative, lambda g: g, max_leverage=1.0)
    with pytest.raises(ValueError, match="not finite"):
        removal_steps(batch, positive * float("nan"), negative, lambda g: g)
