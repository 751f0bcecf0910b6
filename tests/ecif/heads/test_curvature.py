import pytest
import torch
from torch.func import grad, hessian, jacrev

from ecif.heads import embed, logits, logits_jvp, logits_vjp, tangents
from ecif.heads.curvature import gauss_newton_product, loss_gradient
from ecif.losses import Clip, Dcl, Loss, SigLip, SoftInfoNCE
from ecif.losses.contrastive import batch_loss
from tests.support.problems import flat, random_features, random_heads, slow_logits, slow_loss

HEADS = random_heads()
PARTS = [random_features(6, seed) for seed in (5, 6)]
BATCHES = [embed(HEADS, *part) for part in PARTS]
PAIRS = embed(HEADS, *(torch.cat(side) for side in zip(*PARTS, strict=True)))
ROWS = list(torch.arange(12).split(6))
IDENTITY = torch.eye(HEADS.size, dtype=torch.float64)


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
    assert torch.allclose(gauss_newton_product(HEADS, PAIRS, ROWS, directions), directions @ explicit_gauss_newton())


def test_gauss_newton_is_positive_semidefinite_and_additive_over_batches():
    matrix = gauss_newton_product(HEADS, PAIRS, ROWS, IDENTITY)
    assert torch.allclose(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10
    parts = [gauss_newton_product(HEADS, PAIRS, [rows], IDENTITY) for rows in ROWS]
    assert torch.allclose(matrix, parts[0] + parts[1])


def test_loss_gradient_against_autograd():
    def loss(weights):
        return sum(slow_loss(slow_logits(HEADS, weights, *part)) for part in PARTS)

    assert torch.allclose(loss_gradient(HEADS, BATCHES), grad(loss)(flat(HEADS)))


def test_single_precision_agrees_with_double():
    heads = HEADS._replace(image=HEADS.image.float(), text=HEADS.text.float())
    single = embed(heads, PAIRS.images.float(), PAIRS.texts.float())
    direction = torch.randn(1, HEADS.size, dtype=torch.float64)
    truth = gauss_newton_product(HEADS, PAIRS, ROWS, direction)
    assert (gauss_newton_product(heads, single, ROWS, direction.float()).double() - truth).norm() < 1e-5 * truth.norm()


class Written(Loss, name="written"):
    """CLIP's loss as a user would write it: for one batch, without closed forms."""

    def batch_loss(self, similarity):
        return batch_loss(similarity)

    def pair_loss(self, similarity):
        return similarity.logsumexp(1) + similarity.logsumexp(0) - 2 * similarity.diagonal()


@pytest.mark.parametrize("loss", [Clip(), SigLip(), Dcl(), SoftInfoNCE(), Written()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 3, 4], [1, 0, 6, 5], [2, 2, 8], [7]], ids=str)
def test_batches_of_any_sizes_give_the_sum_of_their_products(loss, sizes, monkeypatch):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    batches = list(order[: sum(sizes)].split(sizes))
    directions = torch.randn(3, HEADS.size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    truth = torch.zeros_like(directions)
    for batch in (PAIRS.take(rows) for rows in batches if len(rows)):
        for total, direction in zip(truth, directions, strict=True):
            tangent = logits_jvp(HEADS, batch, *tangents(HEADS, batch, direction))
            total += logits_vjp(HEADS, batch, loss.gauss_newton_cotangent(logits(HEADS, batch), tangent))
    for entries in (1, 150, 2**16):
        monkeypatch.setattr("ecif.heads.curvature.ENTRIES", {"cpu": entries})
        assert torch.allclose(gauss_newton_product(HEADS, PAIRS, batches, directions, loss), truth)
