"""Influence in forward mode, against matrices written out and against training again."""

import pytest
import torch
from scipy.stats import spearmanr
from torch.func import grad, jacrev

from ecif.forward.mode import Logits, flatten, gauss_newton_product, loss_gradient, scores
from ecif.losses import Clip, Dcl, SigLip, SoftInfoNCE
from ecif.losses.contrastive import batch_loss
from ecif.solve import conjugate_gradient
from tests.support import convex
from tests.support.perceptrons import (
    BATCHES,
    PERCEPTRONS,
    TARGETS,
    explicit_gauss_newton,
    of_flat,
    perceptrons,
    product,
    randn,
    slow_pair_gradients,
    target_gradients,
)
from tests.support.problems import slow_loss


@pytest.mark.parametrize("kind", ["exact", "taylor"])
def test_influence_is_every_pairs_gradient_through_the_explicit_inverse_curvature(kind):
    matrix = explicit_gauss_newton(perceptrons, PERCEPTRONS, BATCHES)
    solution = conjugate_gradient(product, target_gradients(), damping=0.5, tolerance=1e-10, max_iterations=500)
    losses = [lambda w, t=t: sum(slow_loss(of_flat(perceptrons, PERCEPTRONS, b)(w)) for b in t) for t in TARGETS]
    truth = torch.stack([grad(loss)(flatten(PERCEPTRONS)) for loss in losses])
    inverse = torch.linalg.inv(matrix + 0.5 * torch.eye(len(matrix), dtype=torch.float64))
    for batch in BATCHES:
        for ours, gradients in zip(
            scores(perceptrons, PERCEPTRONS, batch, solution.directions, Clip(kind)),
            slow_pair_gradients(perceptrons, PERCEPTRONS, batch, kind),
            strict=True,
        ):
            assert torch.allclose(ours, truth @ inverse @ gradients.T, rtol=1e-7)


def test_gradient_and_gauss_newton_products_against_the_explicit_ones():
    matrix = explicit_gauss_newton(perceptrons, PERCEPTRONS, BATCHES)
    assert torch.allclose(product(torch.eye(len(matrix), dtype=torch.float64)), matrix)
    truth = grad(lambda w: sum(slow_loss(of_flat(perceptrons, PERCEPTRONS, b)(w)) for b in BATCHES))(flatten(PERCEPTRONS))
    assert torch.allclose(loss_gradient(perceptrons, PERCEPTRONS, BATCHES), truth)


def test_influence_predicts_what_training_again_without_the_pair_does():
    bilinear = Logits(lambda parameters, batch: (batch[1] @ parameters["w"], batch[0]), lambda parameters, u, v: u @ v.T)
    pairs = lambda rows: (convex.IMAGES[rows], convex.TEXTS[rows])  # noqa: E731
    sample = [pairs(rows) for rows in convex.BATCHES]
    w = convex.train(convex.BATCHES, torch.zeros(convex.D_TEXT * convex.D_IMAGE, dtype=torch.float64))
    parameters = {"w": w.view(convex.D_TEXT, convex.D_IMAGE)}
    gradient = loss_gradient(bilinear, parameters, [pairs(convex.CLEAN)])[None]
    solution = conjugate_gradient(lambda v: gauss_newton_product(bilinear, parameters, sample, v), gradient, convex.DAMPING)
    before, predicted, truth = batch_loss(convex.logits(w, convex.CLEAN)), [], []
    for i, rows in enumerate(convex.BATCHES):
        positive, negative = scores(bilinear, parameters, pairs(rows), solution.directions)
        predicted.append((positive + negative)[0])
        for n in range(len(rows)):
            less = [*convex.BATCHES[:i], rows[torch.arange(len(rows)) != n], *convex.BATCHES[i + 1 :]]
            truth.append(batch_loss(convex.logits(convex.train(less, w), convex.CLEAN)) - before)
    predicted, truth = torch.cat(predicted), torch.stack(truth)
    assert spearmanr(predicted, truth)[0] > 0.85
    clear = truth.abs() > 0.2 * truth.abs().max()
    assert clear.sum() > 5
    assert (predicted.sign() == truth.sign())[clear].double().mean() >= 0.9


@pytest.mark.parametrize("loss", [SigLip(), Dcl(), SoftInfoNCE()])
def test_another_loss_against_explicit_gradients_and_matrix(loss):
    batch, w = BATCHES[0], flatten(PERCEPTRONS)
    f = of_flat(perceptrons, PERCEPTRONS, batch)
    assert torch.allclose(loss_gradient(perceptrons, PERCEPTRONS, [batch], loss), grad(lambda v: loss.batch_loss(f(v)))(w))
    directions = randn(2, len(w), seed=30)
    jacobian, s = jacrev(f)(w).reshape(36, -1), f(w)
    curvature = jacrev(loss.cotangent)(s).reshape(36, 36)
    products = gauss_newton_product(perceptrons, PERCEPTRONS, [batch], directions, loss)
    assert torch.allclose(products, directions @ (jacobian.T @ curvature @ jacobian))
    parts = scores(perceptrons, PERCEPTRONS, batch, directions, loss)
    for part, function in zip(parts, (loss.pair_loss, loss.negative_loss), strict=True):
        gradients = jacrev(function)(s).reshape(6, 36) @ jacobian
        assert torch.allclose(part, directions @ gradients.T)
