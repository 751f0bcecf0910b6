import hashlib
import itertools

import pytest
import torch
from torch.func import jacrev

from ecif.heads import embed
from ecif.heads.curvature import gauss_newton_product, loss_gradient
from ecif.heads.influence import score
from ecif.losses import Clip
from ecif.losses.contrastive import batch_loss
from ecif.projected.gradients import (
    CurvatureSum,
    _draw_labels,
    damped,
    gauss_newton,
    pair_gradients,
    project_batch,
    sampled_gauss_newton,
)
from ecif.projected.projection import identity_projection, pca_projection, random_bytes, random_projection
from tests.support.problems import flat, random_features, random_heads, slow_logits, without

HEADS = random_heads()
IMAGES, TEXTS = random_features(12)
PAIRS = embed(HEADS, IMAGES, TEXTS)
BATCHES = list(torch.randperm(12, generator=torch.Generator().manual_seed(1)).split(6))
IDENTITY = identity_projection(HEADS)
RANDOM = random_projection(HEADS, (3, 2), (4, 3), seed=5)
PCA = pca_projection(HEADS, PAIRS, (3, 2), (4, 3))
PROJECTIONS = {"identity": IDENTITY, "random": RANDOM, "pca": PCA}
SIZE = HEADS.size


def matrix_of(projection):
    """R [P, k], one unit direction after another."""
    return projection.apply(HEADS, torch.eye(SIZE, dtype=torch.float64))


def slow_parts(s, kind):
    """Pos and Neg of every pair [2, B] from the definition."""
    total, parts = batch_loss(s), []
    for n in range(len(s)):
        others = torch.arange(len(s)) != n
        positive = s[n].logsumexp(0) + s[:, n].logsumexp(0) - 2 * s[n, n]
        taylor = s.softmax(1)[others, n].sum() + s.softmax(0)[n, others].sum()
        parts.append(torch.stack([positive, taylor if kind == "taylor" else total - batch_loss(without(s, n)) - positive]))
    return torch.stack(parts, dim=1)


def seen(rows, projection, heads=HEADS, pairs=PAIRS):
    return project_batch(heads, pairs.take(rows), projection)


def indexed(projection, kind="exact"):
    """Gradients of all pairs in the order of the pairs, and the exact curvature."""
    k = projection.size
    gradients, curvature = torch.zeros(2, 12, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    for rows in BATCHES:
        batch = seen(rows, projection)
        gradients[:, rows] = torch.stack(pair_gradients(batch, kind))
        curvature += gauss_newton(batch)
    return gradients, curvature


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


def test_full_rank_index_answers_a_new_question_as_solving_it_does():
    (positive, negative), curvature = indexed(IDENTITY)
    new_images, new_texts = random_features(5, seed=8)
    target = loss_gradient(HEADS, [embed(HEADS, new_images, new_texts)])[None]
    explicit = gauss_newton_product(HEADS, [PAIRS.take(r) for r in BATCHES], torch.eye(SIZE, dtype=torch.float64))
    q = torch.linalg.solve(explicit + 3 * torch.eye(SIZE, dtype=torch.float64), target[0])[None]
    scores = score(HEADS, PAIRS, BATCHES, q)
    answer = damped(curvature, 3.0).influence(positive + negative, IDENTITY.apply(HEADS, target))
    assert torch.allclose(answer, scores.positive + scores.negative, rtol=1e-8)


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


@pytest.mark.parametrize("name", PROJECTIONS)
def test_curvature_is_the_projected_gauss_newton_matrix(name):
    r = matrix_of(PROJECTIONS[name])
    products = gauss_newton_product(HEADS, [PAIRS.take(rows) for rows in BATCHES], torch.eye(SIZE, dtype=torch.float64))
    _, curvature = indexed(PROJECTIONS[name])
    assert torch.allclose(curvature, r.T @ products @ r, rtol=1e-11, atol=1e-12)


def test_sampled_curvature_is_exact_over_all_labels():
    # The expectation written out: every label of every row and column, weighted with its probability.
    batch = seen(BATCHES[0], RANDOM)
    p, q, everyone = batch.logits.softmax(1), batch.logits.softmax(0), torch.arange(6)
    total = torch.zeros(RANDOM.size, RANDOM.size, dtype=torch.float64)
    for i, j in itertools.product(everyone, everyone):
        entry = batch.entries(i[None], j[None])[0]
        row, column = entry - batch.row_mean[i], entry - batch.column_mean[j]
        total += p[i, j] * torch.outer(row, row) + q[i, j] * torch.outer(column, column)
    assert torch.allclose(total, gauss_newton(batch), rtol=1e-12, atol=1e-12)


def test_sampled_curvature_is_unbiased_and_its_error_falls_with_the_draws():
    batch = seen(BATCHES[0], RANDOM)
    exact = gauss_newton(batch)
    means = {n: torch.stack([sampled_gauss_newton(batch, f"{n} {seed}", n) for seed in range(200)]) for n in (1, 64)}
    for estimates in means.values():
        z = (estimates.mean(0) - exact) / (estimates.std(0) / 200**0.5)
        assert z.abs().max() < 5
    assert (means[64].mean(0) - exact).norm() < 0.03 * exact.norm()
    ratio = means[1].var(0).sum() / means[64].var(0).sum()
    assert 40 < ratio < 100


def test_labels_follow_their_probabilities_and_nothing_impossible_is_drawn():
    p = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    labels = _draw_labels(p, "key", 8000).view(8000, 3)
    counts = torch.stack([(labels == j).double().mean(0) for j in range(3)], dim=1)
    assert torch.allclose(counts, p.double(), atol=0.02)
    assert (counts[p == 0] == 0).all()


def test_a_key_seeds_the_draw():
    batch = seen(BATCHES[0], RANDOM)
    assert torch.equal(sampled_gauss_newton(batch, "shard 0 1"), sampled_gauss_newton(batch, "shard 0 1"))
    assert not torch.equal(sampled_gauss_newton(batch, "shard 0 1"), sampled_gauss_newton(batch, "shard 0 2"))
    assert _draw_labels(torch.full((4, 4), 0.25), "shard 0 1", 2).tolist() == [1, 2, 1, 1, 0, 3, 2, 1]  # on every machine


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


def test_therandom_bytes_are_shake_256():
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


def test_batched_equals_looped():
    # Gradients depend on the batch only; a pair's place in it does not matter.
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    rows = BATCHES[0]
    straight, shuffled = (torch.stack(pair_gradients(seen(r, RANDOM))) for r in (rows, rows[order]))
    assert torch.allclose(straight[:, order], shuffled, rtol=1e-11)
    alone = project_batch(HEADS, embed(HEADS, IMAGES[rows], TEXTS[rows]), RANDOM)
    assert torch.equal(torch.stack(pair_gradients(alone)), straight)


def test_merged_curvature_has_the_same_bytes_in_every_order_and_tree():
    parts = []
    for seed in range(8):
        pairs = embed(HEADS, *random_features(6, seed))
        batch = project_batch(HEADS, pairs, RANDOM)
        parts.append(CurvatureSum.of(sampled_gauss_newton(batch, str(seed)), 6))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    halves = [parts[7].merge(parts[2]).merge(parts[5]), parts[0].merge(parts[6]).merge(parts[1].merge(parts[4]))]
    tree = halves[1].merge(parts[3]).merge(halves[0])
    assert torch.equal(whole.units, tree.units)
    assert whole.pairs == tree.pairs == 48
    assert whole.matrix().numpy().tobytes() == tree.matrix().numpy().tobytes()
    floats = sum(part.matrix() for part in parts)
    assert torch.equal(whole.matrix(), torch.as_tensor(floats))  # small sums are exact in float64 too


def test_fixed_point_is_as_good_as_its_last_bit():
    exact = gauss_newton(seen(BATCHES[0], RANDOM))
    for bits in (10, 24, 40):
        stored = CurvatureSum.of(exact, 6, bits).matrix()
        assert (stored - exact).abs().max() <= 1.0001 * 2.0 ** -(bits + 1)
        assert torch.equal(stored, stored.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**38])
def test_curvature_that_does_not_fit_is_an_error(value):
    with pytest.raises(ValueError, match=r"not finite or above 2.38: use unit features"):
        CurvatureSum.of(torch.eye(3) * value, 6)
    half = CurvatureSum.of(torch.eye(3) * 2.0**37, 6)
    with pytest.raises(ValueError, match="12 pairs is above"):
        half.merge(half)


def test_curvatures_that_do_not_belong_together_are_an_error():
    with pytest.raises(ValueError, match="same projection"):
        CurvatureSum.of(torch.eye(3), 6).merge(CurvatureSum.of(torch.eye(4), 6))
    with pytest.raises(ValueError, match="same projection"):
        CurvatureSum.of(torch.eye(3), 6).merge(CurvatureSum.of(torch.eye(3), 6, 20))


def test_self_influence_is_the_diagonal_of_the_pairwise_influence():
    (positive, negative), curvature = indexed(RANDOM)
    gradients, solver = positive + negative, damped(curvature, 0.1)
    pairwise = solver.influence(gradients, gradients)
    assert torch.allclose(pairwise, pairwise.T)
    assert torch.allclose(solver.self_influence(gradients), pairwise.diagonal())
    explicit = torch.linalg.solve(curvature + 0.1 * torch.eye(RANDOM.size, dtype=torch.float64), gradients.T).T
    assert torch.allclose(solver.solve(gradients), explicit)
    assert torch.allclose(pairwise, gradients @ explicit.T)


def test_influence_is_the_sum_of_its_parts():
    (positive, negative), curvature = indexed(RANDOM)
    solver, query = damped(curvature, 0.1), torch.ones(1, RANDOM.size)
    parts = solver.influence(positive, query) + solver.influence(negative, query)
    assert torch.allclose(solver.influence(positive + negative, query), parts)


def test_a_matrix_that_is_not_positive_definite_says_what_to_do():
    singular = torch.ones(3, 3)
    with pytest.raises(ValueError, match="not positive definite: raise the damping"):
        damped(singular, 0.0)
    assert damped(singular, 0.1).cholesky.isfinite().all()
    with pytest.raises(ValueError, match="not positive definite"):
        damped(torch.eye(3) * float("nan"), 0.1)
    with pytest.raises(ValueError, match="cannot be below 0"):
        damped(torch.eye(3), -1.0)
