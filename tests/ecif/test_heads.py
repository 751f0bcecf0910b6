import torch
from problems import flat, random_features, random_heads, slow_logits
from torch.func import jacrev, jvp

from ecif.heads import Heads, embed, logits, logits_jvp, logits_vjp, standardised, tangents

HEADS = random_heads()
IMAGES, TEXTS = random_features(6)
DIRECTION = torch.randn(HEADS.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def as_function(weights):
    return slow_logits(HEADS, weights, IMAGES, TEXTS)


def test_logits_are_scaled_cosines_row_text_column_image():
    assert torch.allclose(logits(HEADS, embed(HEADS, IMAGES, TEXTS)), as_function(flat(HEADS)))


def test_tangent_and_cotangent_passes_against_autograd():
    pairs = embed(HEADS, IMAGES, TEXTS)
    tangent = logits_jvp(HEADS, pairs, *tangents(HEADS, pairs, DIRECTION))
    assert torch.allclose(tangent, jvp(as_function, (flat(HEADS),), (DIRECTION,))[1])
    cotangent = torch.randn(6, 6, dtype=torch.float64)
    jacobian = jacrev(as_function)(flat(HEADS))
    assert torch.allclose(logits_vjp(HEADS, pairs, cotangent), torch.einsum("ij,ijp->p", cotangent, jacobian))


def test_standardised_heads_are_the_same_model():
    scaled = Heads(3 * HEADS.image, 0.1 * HEADS.text, HEADS.logit_scale)
    for heads in (HEADS, scaled):
        same = standardised(heads)
        assert torch.allclose(logits(same, embed(same, IMAGES, TEXTS)), as_function(flat(HEADS)))
        assert torch.allclose(same.image.norm() ** 2, torch.tensor(5.0, dtype=torch.float64))


def test_norm_of_a_feature_does_not_matter():
    pairs, scaled = embed(HEADS, IMAGES, TEXTS), embed(HEADS, 7 * IMAGES, TEXTS / 9)
    assert torch.allclose(logits(HEADS, pairs), logits(HEADS, scaled))
    cotangent = torch.randn(6, 6, dtype=torch.float64)
    assert torch.allclose(logits_vjp(HEADS, pairs, cotangent), logits_vjp(HEADS, scaled, cotangent))


def test_a_feature_without_direction_gives_finite_numbers():
    images = IMAGES.clone()
    images[2] = 0
    pairs = embed(HEADS, images, TEXTS)
    assert logits(HEADS, pairs).isfinite().all()
    assert (logits(HEADS, pairs)[:, 2] == 0).all()
