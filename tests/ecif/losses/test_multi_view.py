"""Influence in a model of three views, as the docstring of MvInfoNCE says, against deletion and autograd."""

import torch
from torch.func import grad, jvp, vjp
from torch.nn.functional import normalize

from ecif.losses import MvInfoNCE
from ecif.solve import conjugate_gradient

VIEWS, ITEMS, WIDTH, SCALE, DAMPING = 3, 6, 4, 5.0, 0.5
G = torch.Generator().manual_seed(0)
FEATURES, CLEAN = torch.randn(2, VIEWS, ITEMS, 5, generator=G, dtype=torch.float64)
WEIGHTS = torch.randn(VIEWS * 5 * WIDTH, generator=G, dtype=torch.float64)
LOSS = MvInfoNCE()


def embed(weights, features):
    return normalize(features @ weights.view(VIEWS, 5, WIDTH), dim=2)


def similarity(weights, features):
    z = embed(weights, features)
    return SCALE * torch.einsum("aid,bjd->abij", z, z)


def product(directions):
    """Gauss-Newton products, one direction after another."""
    pull_back = vjp(lambda w: similarity(w, FEATURES), WEIGHTS)[1]
    curved = []
    for direction in directions:
        s, tangent = jvp(lambda w: similarity(w, FEATURES), (WEIGHTS,), (direction,))
        curved.append(pull_back(LOSS.gauss_newton_cotangent(s, tangent))[0])
    return torch.stack(curved)


def test_influence_of_every_item_is_that_of_its_deletion_along_the_solved_direction():
    gradient = grad(lambda w: LOSS.batch_loss(similarity(w, CLEAN)))(WEIGHTS)
    q = conjugate_gradient(product, gradient[None], DAMPING, tolerance=1e-10, max_iterations=500).directions[0]
    matrix = product(torch.eye(len(WEIGHTS), dtype=torch.float64)) + DAMPING * torch.eye(len(WEIGHTS), dtype=torch.float64)
    assert torch.allclose(matrix @ q, gradient)

    z, dz = jvp(lambda w: embed(w, FEATURES), (WEIGHTS,), (q,))
    s = SCALE * torch.einsum("aid,bjd->abij", z, z)
    tangent = SCALE * (torch.einsum("aid,bjd->abij", dz, z) + torch.einsum("aid,bjd->abij", z, dz))
    positive, negative = LOSS.pair_derivatives(s, tangent)

    for n in range(ITEMS):
        rest = FEATURES[:, torch.arange(ITEMS) != n]

        def taken(w, rest=rest):
            return LOSS.batch_loss(similarity(w, FEATURES)) - LOSS.batch_loss(similarity(w, rest))

        assert torch.allclose((positive + negative)[n], grad(taken)(WEIGHTS) @ q)
