import math

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp

from ecif.heads import Heads, embed, logits, logits_jvp, logits_vjp, standardised, tangents
from ecif.heads.curvature import gauss_newton_product, loss_gradient
from ecif.heads.influence import pair_losses, score
from ecif.losses import Clip, SigLip
from tests.support.problems import flat, random_features, random_heads, slow_logits

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


TRAINED = {
    "log s": HEADS._replace(train_logit_scale=True),
    "b": HEADS._replace(logit_bias=-2.0, train_logit_bias=True),
    "log s and b": HEADS._replace(logit_bias=-2.0, train_logit_scale=True, train_logit_bias=True),
}


def slow_with_scalars(heads):
    """S as a function of the flat parameters, log s and b among them."""

    def function(point):
        scalars = list(point[HEADS.size :])
        scale = scalars.pop(0).exp() if heads.train_logit_scale else heads.logit_scale
        bias = scalars.pop(0) if heads.train_logit_bias else heads.logit_bias
        return as_function(point[: HEADS.size]) * scale / HEADS.logit_scale + bias

    return function


@pytest.mark.parametrize("name", TRAINED)
def test_logit_scale_and_bias_as_parameters_against_autograd(name):
    heads, function = TRAINED[name], slow_with_scalars(TRAINED[name])
    pairs = embed(heads, IMAGES, TEXTS)
    assert torch.allclose(logits(heads, pairs), function(heads.flat()))
    g = torch.Generator().manual_seed(3)
    direction, cotangent = (torch.randn(n, generator=g, dtype=torch.float64) for n in ((heads.size,), (6, 6)))
    tangent = logits_jvp(heads, pairs, *tangents(heads, pairs, direction))
    assert torch.allclose(tangent, jvp(function, (heads.flat(),), (direction,))[1])
    jacobian = jacrev(function)(heads.flat())
    assert torch.allclose(logits_vjp(heads, pairs, cotangent), torch.einsum("ij,ijp->p", cotangent, jacobian))


@pytest.mark.parametrize("name", TRAINED)
def test_heads_at_a_point_are_the_model_with_those_parameters(name):
    heads = TRAINED[name]
    point = heads.flat() + 0.1
    moved = heads.at(point)
    assert torch.allclose(moved.flat(), point)
    assert torch.allclose(logits(moved, embed(moved, IMAGES, TEXTS)), slow_with_scalars(heads)(point))
    assert moved.logit_scale == pytest.approx(heads.logit_scale * (math.exp(0.1) if heads.train_logit_scale else 1))


@pytest.mark.parametrize("loss", [Clip(), SigLip()], ids=["clip", "siglip"])
def test_gradient_curvature_and_scores_with_scalar_parameters_against_autograd(loss):
    heads = TRAINED["log s and b"]
    function, pairs, point = slow_with_scalars(heads), embed(heads, IMAGES, TEXTS), heads.flat()
    assert torch.allclose(loss_gradient(heads, [pairs], loss), grad(lambda w: loss.batch_loss(function(w)))(point))
    jacobian, s = jacrev(function)(point).reshape(36, -1), function(point)
    matrix = jacobian.T @ hessian(loss.batch_loss)(s).reshape(36, 36) @ jacobian
    directions = torch.randn(2, heads.size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.allclose(gauss_newton_product(heads, pairs, [torch.arange(6)], directions, loss), directions @ matrix)
    scores = score(heads, pairs, [torch.arange(6)], directions, loss)
    gradients = jacrev(lambda w: torch.stack([loss.pair_loss(function(w)), loss.negative_loss(function(w))]))(point)
    assert torch.allclose(scores.positive, directions @ gradients[0].T)
    assert torch.allclose(scores.negative, directions @ gradients[1].T)
    assert torch.allclose(pair_losses(heads, pairs, [torch.arange(6)], loss), loss.pair_loss(s))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_head_that_is_zero_or_not_finite_is_refused(bad):
    heads = random_heads()
    with pytest.raises(ValueError, match=r"the text head is (zero|not finite)"):
        standardised(heads._replace(text=heads.text * bad))


@pytest.mark.parametrize("scale", [math.inf, math.nan, 0.0, -1.0])
def test_a_logit_scale_that_is_no_positive_number_is_refused(scale):
    with pytest.raises(ValueError, match="the logit scale is"):
        standardised(random_heads(scale=scale))


def test_a_feature_in_a_heads_null_space_is_orthogonal_to_everything_and_moves_nothing():
    heads, (images, texts) = random_heads(), random_features(6)
    heads = heads._replace(image=heads.image.float(), text=heads.text.float())
    null = torch.linalg.svd(heads.image.T)[2][-1]  # the image head has 7 rows and 5 columns
    images = torch.cat([images.float(), null[None]])
    pairs = embed(heads, images, torch.cat([texts, texts[:1]]).float())
    assert (null @ heads.image).any()  # rounding: not exactly zero
    assert not pairs.v[-1].any()
    direction = torch.randn(heads.size, generator=torch.Generator().manual_seed(0))
    du, dv, _ = tangents(heads, pairs, direction)
    assert not dv[-1].any()
    assert du.isfinite().all()
    assert logits_vjp(heads, pairs, torch.ones(7, 7)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single_precision(dtype):
    heads, (images, texts) = random_heads(scale=100.0), random_features(20)
    half = embed(heads._replace(image=heads.image.to(dtype), text=heads.text.to(dtype)), images.to(dtype), texts.to(dtype))
    same = [part.to(dtype).double() for part in (heads.image, heads.text, images, texts)]
    exact = embed(heads._replace(image=same[0], text=same[1]), *same[2:])
    assert (logits(heads, half) - logits(heads, exact)).abs().max() < 1e-3
