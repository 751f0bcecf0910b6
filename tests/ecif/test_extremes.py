"""The whole method where its mathematics is at the edge: logit scale 100, equal pairs, null spaces, half precision."""

import functools

import pytest
import torch

import ecif
from ecif.evaluation import spearman
from tests.support.clip_like import clip_like

FEW = {"batch_size": 32, "folds": 3, "checkpoints": 1, "refits": 4, "repeats": 1}
SETTINGS = ecif.Settings(**FEW, learning_rate=3e-4, epochs=2, pull=1.0)
PAIRS = 128


@functools.cache
def drawn():
    return clip_like(PAIRS + 60, 0.2, 48, 32, noise=0.7)


def columns(images=None, texts=None, heads=None, dtype=torch.float32):
    world = drawn()
    images = (world.images if images is None else images).to(dtype)
    texts = (world.texts if texts is None else texts).to(dtype)
    clean = ecif.Contrastive(images[PAIRS:], texts[PAIRS:])
    return ecif.attribute(images[:PAIRS], texts[:PAIRS], {"clean": clean}, heads=heads or world.heads, settings=SETTINGS)


def finite(found):
    return {name for name, values in found.items() if not values.isfinite().all()} == set()


def test_pairs_that_are_all_alike_in_many_batches_have_finite_scores():
    world = drawn()
    images, texts = world.images.clone(), world.texts.clone()
    images[:80], texts[:80] = images[0], texts[0]
    assert finite(columns(images, texts))


def test_features_in_a_heads_null_space_have_finite_scores_and_no_influence_through_it():
    world = drawn()
    images, texts = world.images.clone(), world.texts.clone()
    images[3] = torch.linalg.svd(world.heads.image.T)[2][-1]
    texts[3] = 0.0
    found = columns(images, texts)
    assert finite(found)
    assert found["clip_score"][3] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_ranked_as_in_single_precision(dtype):
    world = drawn()
    rounded = columns(world.images.to(dtype).float(), world.texts.to(dtype).float())
    found = columns(dtype=dtype)
    for name in ("held_out_loss", "clip_score", "influence_clean"):
        assert spearman(found[name], rounded[name]) > 0.999


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_head_of_zeros_is_refused_with_its_name(side):
    heads = drawn().heads
    with pytest.raises(ValueError, match=f"the {side} head is zero"):
        columns(heads=heads._replace(**{side: torch.zeros_like(heads.image)}))


def test_features_that_are_not_finite_are_refused():
    images = drawn().images.clone()
    images[5, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        columns(images)
