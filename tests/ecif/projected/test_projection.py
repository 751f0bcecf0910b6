"""Projections: what they keep, and that they stay what they were."""

import hashlib

import pytest
import torch

from ecif.projected.curvature import damped
from ecif.projected.projection import (
    capped_ranks,
    pca_of_sample,
    pca_projection,
    random_bytes,
    random_projection,
)
from tests.support.projected import HEADS, IDENTITY, IMAGES, PAIRS, PCA, RANDOM, SIZE, TEXTS, indexed


def test_random_projection_keeps_inner_products_on_average():
    g, h = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = h + g
    products = []
    for seed in range(1500):
        a, b = random_projection(HEADS, (3, 2), (4, 3), seed).apply(HEADS, torch.stack([g, h]))
        products.append(a @ b)
    values = torch.stack(products)
    assert (values.mean() - g @ h).abs() < 4 * values.std() / 1500**0.5
    assert (g @ h).abs() > 8 * values.std() / 1500**0.5  # the test could tell


def test_random_projection_has_the_bytes_it_always_had():
    # A store is only readable with the projection it was written with: these never change.
    digest = hashlib.sha256()
    for factors in RANDOM:
        for part in factors:
            digest.update(part.contiguous().numpy().tobytes())
    assert digest.hexdigest() == "8719292827097bbf28b51fccccbf9e4e12d9e76869fc34c31b43694c1b82bc05"
    signs = [[-1, -1], [-1, 1], [-1, -1], [-1, -1], [-1, 1]]
    assert RANDOM.image.embedding.sign().int().tolist() == signs
    assert torch.equal(random_projection(HEADS, (3, 2), (4, 3), seed=5).text.features, RANDOM.text.features)
    assert not torch.equal(random_projection(HEADS, (3, 2), (4, 3), seed=6).text.features, RANDOM.text.features)


def test_the_random_bytes_are_shake_256():
    # FIPS 202 example: the empty message.
    assert bytes(random_bytes("", 8).tolist()).hex() == "46b9dd2b0ba88d13"


def test_pca_keeps_what_varies_most_and_fixes_the_signs():
    assert torch.allclose(PCA.text.features.T @ PCA.text.features, torch.eye(4, dtype=torch.float64))
    kept = (TEXTS @ PCA.text.features).square().sum()
    assert torch.allclose(kept, torch.linalg.svdvals(TEXTS)[:4].square().sum())
    largest = PCA.text.features.gather(0, PCA.text.features.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_a_full_rank_rotation_changes_no_answer():
    full = pca_projection(HEADS, PAIRS, (7, 5), (6, 5))
    answers = []
    for projection in (IDENTITY, full):
        (positive, negative), curvature = indexed(projection)
        answers.append(damped(curvature, 0.5).self_influence(positive + negative))
    assert torch.allclose(*answers, rtol=1e-9)


@pytest.mark.parametrize("rank", [(0, 2), (8, 2), (3, 6)])
def test_a_rank_that_does_not_fit_is_an_error(rank):
    with pytest.raises(ValueError, match=r"rank of .* image head"):
        random_projection(HEADS, rank, (4, 3), seed=0)
    with pytest.raises(ValueError, match=r"rank of .* image head"):
        pca_projection(HEADS, PAIRS, rank, (4, 3))


@pytest.mark.parametrize("rank", [(3, 2), (6, 5), (7, 2), (100, 100)])
def test_a_rank_is_capped_at_the_size_of_each_head(rank):
    image, text = capped_ranks(HEADS, rank)
    assert image == (min(rank[0], 7), min(rank[1], 5))
    assert text == (min(rank[0], 6), min(rank[1], 5))
    ours, truth = pca_of_sample(HEADS, IMAGES, TEXTS, rank), pca_projection(HEADS, PAIRS, image, text)
    assert all(map(torch.equal, [*ours.image, *ours.text], [*truth.image, *truth.text]))
