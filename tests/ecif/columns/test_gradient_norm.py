"""The norm of every pair's gradient against autograd, pair by pair."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from ecif.columns import GradientNorm
from ecif.columns.gradient_norm import pair_gradient_norms
from ecif.heads import Heads, embed
from ecif.losses import Clip, Dcl, Loss, SigLip, SoftInfoNCE
from tests.support.problems import held_out_pairs, random_features, random_heads

TWO_TOWER = {"clip": Clip(), "siglip": SigLip(), "dcl": Dcl(), "soft_infonce": SoftInfoNCE()}


def slow_norms(heads: Heads, images: Tensor, texts: Tensor, loss: Loss) -> Tensor:
    """[B] norms of the rows of the Jacobian of all Pos_n with respect to the flat parameters."""

    def pair_loss(point: Tensor) -> Tensor:
        image, text = heads.split(point)
        log_scale, bias = heads.split_scalars(point)
        scale = log_scale.exp() if heads.train_logit_scale else heads.logit_scale
        z_image, z_text = images @ image, texts @ text
        cosine = (z_text / z_text.norm(dim=1, keepdim=True)) @ (z_image / z_image.norm(dim=1, keepdim=True)).T
        return loss.pair_loss(scale * cosine + (bias if heads.train_logit_bias else heads.logit_bias))

    return jacrev(pair_loss)(heads.flat()).norm(dim=1)


@pytest.mark.parametrize("loss", TWO_TOWER.values(), ids=TWO_TOWER)
@pytest.mark.parametrize(("scale", "bias"), product([False, True], [False, True]))
@pytest.mark.parametrize("items", [1, 2, 9])
def test_it_is_that_of_autograd(loss, scale, bias, items):
    heads = random_heads()._replace(logit_bias=-1.5, train_logit_scale=scale, train_logit_bias=bias)
    images, texts = random_features(items)
    found = pair_gradient_norms(heads, embed(heads, images, texts), loss)
    assert torch.allclose(found, slow_norms(heads, images, texts, loss), atol=1e-7)


@pytest.mark.parametrize("loss", TWO_TOWER.values(), ids=TWO_TOWER)
def test_a_pair_has_the_mean_over_its_batches_and_the_seeds(loss):
    pairs = held_out_pairs(loss=loss)
    values = GradientNorm().values(pairs)
    norms: list[list[float]] = [[] for _ in range(12)]
    for heads, rows in product(pairs.fitted, pairs.batches):
        for n, norm in zip(rows.tolist(), slow_norms(heads, pairs.images[rows], pairs.texts[rows], loss), strict=True):
            norms[n].append(norm.item())
    assert [len(of_pair) for of_pair in norms] == [2] + [4] * 11
    assert torch.allclose(values, torch.tensor([sum(n) / len(n) for n in norms], dtype=torch.float64))


def test_single_precision_keeps_it_where_embeddings_nearly_match():
    heads = random_heads(scale=100.0)
    images, texts = random_features(64)
    texts = torch.linalg.lstsq(heads.text.T, (images @ heads.image).T).solution.T + 1e-3 * texts  # cosines of 1 - 1e-6
    truth = slow_norms(heads, images, texts, TWO_TOWER["clip"])
    single = heads._replace(image=heads.image.float(), text=heads.text.float())
    found = pair_gradient_norms(single, embed(single, images.float(), texts.float()), TWO_TOWER["clip"])
    assert torch.allclose(found.double(), truth, rtol=1e-2, atol=1e-3 * truth.max().item())
