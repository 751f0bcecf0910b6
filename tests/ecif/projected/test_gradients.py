"""Gradients of every pair in a projected space, against autograd."""

import pytest
import torch
from torch.func import jacrev

from ecif.heads import embed
from ecif.heads.influence import score
from ecif.losses import Clip
from ecif.losses.contrastive import batch_loss
from ecif.projected.gradients import pair_gradients, project_batch
from tests.support.problems import flat, slow_logits, without
from tests.support.projected import (
    BATCHES,
    HEADS,
    IDENTITY,
    IMAGES,
    PAIRS,
    PROJECTIONS,
    RANDOM,
    SIZE,
    TEXTS,
    indexed,
    matrix_of,
    seen,
)


def slow_parts(s, kind):
    """Pos and Neg of every pair [2, B] from the definition."""
    total, parts = batch_loss(s), []
    for n in range(len(s)):
        others = torch.arange(len(s)) != n
        positive = s[n].logsumexp(0) + s[:, n].logsumexp(0) - 2 * s[n, n]
        taylor = s.softmax(1)[others, n].sum() + s.softmax(0)[n, others].sum()
        parts.append(torch.stack([positive, taylor if kind == "taylor" else total - batch_loss(without(s, n)) - positive]))
    return torch.stack(parts, dim=1)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("kind", ["exact", "taylor"])
def test_gradients_are_those_of_every_pair_by_autograd(kind, name):
    for rows in BATCHES:
        slow = jacrev(lambda w, r=rows: slow_parts(slow_logits(HEADS, w, IMAGES[r], TEXTS[r]), kind))(flat(HEADS))
        fast = torch.stack(pair_gradients(seen(rows, PROJECTIONS[name]), kind))
        assert torch.allclose(fast, slow @ matrix_of(PROJECTIONS[name]), rtol=1e-12, atol=1e-12)


def test_sums_over_rows_and_columns_are_those_of_the_jacobian():
    m = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = BATCHES[0]
    jacobian = jacrev(lambda w: slow_logits(HEADS, w, IMAGES[rows], TEXTS[rows]))(flat(HEADS)) @ matrix_of(RANDOM)
    batch = seen(rows, RANDOM)
    assert torch.allclose(batch.rows(m), torch.einsum("ij,ijk->ik", m, jacobian), rtol=1e-12, atol=1e-12)
    assert torch.allclose(batch.cols(m), torch.einsum("ij,ijk->jk", m, jacobian), rtol=1e-12, atol=1e-12)
    i, j = torch.tensor([0, 2, 5]), torch.tensor([4, 2, 1])
    assert torch.allclose(batch.entries(i, j), jacobian[i, j], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "taylor"])
def test_full_rank_index_scores_as_the_exact_projection_does(kind):
    directions = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (positive, negative), _ = indexed(IDENTITY, kind)
    scores = score(HEADS, PAIRS, BATCHES, directions, Clip(kind))
    assert torch.allclose(directions @ positive.T, scores.positive, rtol=1e-11)
    assert torch.allclose(directions @ negative.T, scores.negative, rtol=1e-11)


def test_confident_wrong_pairs_keep_finite_gradients_in_single_precision():
    heads = HEADS._replace(logit_scale=100.0)
    wrong = TEXTS.roll(1, 0)  # P of a wrong image is 1 in float32
    truth = torch.stack(pair_gradients(project_batch(heads, embed(heads, IMAGES, wrong), RANDOM)))
    single = heads._replace(image=heads.image.float(), text=heads.text.float())
    batch = project_batch(single, embed(single, IMAGES.float(), wrong.float()), RANDOM)
    assert (batch.logits.softmax(1) == 1).any()
    gradients = torch.stack(pair_gradients(batch))
    assert gradients.dtype == torch.float32
    assert (gradients.double() - truth).norm() < 1e-4 * truth.norm()


def test_a_lone_pair_has_no_negatives_and_a_feature_without_direction_no_derivative():
    positive, negative = pair_gradients(seen(torch.tensor([3]), RANDOM))
    assert (negative == 0).all()
    assert torch.allclose(positive, torch.zeros_like(positive), atol=1e-12)
    images = IMAGES.clone()
    images[2] = 0
    batch = project_batch(HEADS, embed(HEADS, images, TEXTS), RANDOM)
    assert torch.stack(pair_gradients(batch)).isfinite().all()
    everyone = torch.arange(12)
    assert (batch.entries(everyone, torch.full_like(everyone, 2))[:, :6] == 0).all()  # of the image head


def test_batched_equals_looped():
    # Gradients depend on the batch only; a pair's place in it does not matter.
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    rows = BATCHES[0]
    straight, shuffled = (torch.stack(pair_gradients(seen(r, RANDOM))) for r in (rows, rows[order]))
    assert torch.allclose(straight[:, order], shuffled, rtol=1e-11)
    alone = project_batch(HEADS, embed(HEADS, IMAGES[rows], TEXTS[rows]), RANDOM)
    assert torch.equal(torch.stack(pair_gradients(alone)), straight)
