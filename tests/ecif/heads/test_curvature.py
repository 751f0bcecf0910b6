import torch
from torch.func import grad, hessian, jacrev

from ecif.heads import embed
from ecif.heads.curvature import gauss_newton_product, loss_gradient
from tests.support.problems import flat, random_features, random_heads, slow_logits, slow_loss

HEADS = random_heads()
PARTS = [random_features(6, seed) for seed in (5, 6)]
BATCHES = [embed(HEADS, *part) for part in PARTS]


def explicit_gauss_newton():
    """J^T (d2L/dS2) J, every factor written out."""
    total = torch.zeros(HEADS.size, HEADS.size, dtype=torch.float64)
    for images, texts in PARTS:
        jacobian = jacrev(lambda w, i=images, t=texts: slow_logits(HEADS, w, i, t))(flat(HEADS)).reshape(36, -1)
        s = slow_logits(HEADS, flat(HEADS), images, texts)
        total += jacobian.T @ hessian(slow_loss)(s).reshape(36, 36) @ jacobian
    return total


def test_products_against_the_explicit_matrix():
    directions = torch.randn(3, HEADS.size, dtype=torch.float64)
    assert torch.allclose(gauss_newton_product(HEADS, BATCHES, directions), directions @ explicit_gauss_newton())


def test_gauss_newton_is_positive_semidefinite_and_additive_over_batches():
    matrix = gauss_newton_product(HEADS, BATCHES, torch.eye(HEADS.size, dtype=torch.float64))
    assert torch.allclose(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10
    parts = [gauss_newton_product(HEADS, [b], torch.eye(HEADS.size, dtype=torch.float64)) for b in BATCHES]
    assert torch.allclose(matrix, parts[0] + parts[1])


def test_loss_gradient_against_autograd():
    def loss(weights):
        return sum(slow_loss(slow_logits(HEADS, weights, *part)) for part in PARTS)

    assert torch.allclose(loss_gradient(HEADS, BATCHES), grad(loss)(flat(HEADS)))


def test_single_precision_agrees_with_double():
    heads = HEADS._replace(image=HEADS.image.float(), text=HEADS.text.float())
    single = [embed(heads, i.float(), t.float()) for i, t in PARTS]
    direction = torch.randn(1, HEADS.size, dtype=torch.float64)
    truth = gauss_newton_product(HEADS, BATCHES, direction)
    assert (gauss_newton_product(heads, single, direction.float()).double() - truth).norm() < 1e-5 * truth.norm()
