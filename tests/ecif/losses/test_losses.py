"""Every loss against a loop written from its formula; what is derived from it against deletion and finite differences."""

import math
import operator
from functools import reduce

import pytest
import torch
from scipy.stats import spearmanr
from torch.func import grad, hessian, jacrev

from ecif.losses import Clip, Dcl, Loss, MvInfoNCE, SigLip, SoftInfoNCE
from ecif.losses.contract import without

B, V = 7, 3
TWO_TOWER = {"clip": Clip(), "siglip": SigLip(), "dcl": Dcl(), "soft_infonce": SoftInfoNCE()}
LOSSES = TWO_TOWER | {"mv_infonce": MvInfoNCE(), "soft_infonce sharper": SoftInfoNCE(0.5, 0.8, 2.0)}


def embeddings(*shape, seed):
    z = torch.randn(*shape, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z / z.norm(dim=-1, keepdim=True)


def similarity(name, items=B, seed=0, scale=5.0):
    """S of random unit embeddings; of V views for the multi-view loss."""
    if name == "mv_infonce":
        z = embeddings(V, items, seed=seed)
        return scale * torch.einsum("aid,bjd->abij", z, z)
    return scale * embeddings(items, seed=seed) @ embeddings(items, seed=seed + 1).T - (3.0 if name == "siglip" else 0.0)


def move(name, seed=10):
    """A change S' of the shape of S."""
    return similarity(name, seed=seed) - similarity(name, seed=seed + 5)


def slow_clip(s):
    total = 0
    for m in (s, s.T):
        for i in range(len(m)):
            total -= torch.log(torch.exp(m[i, i]) / sum(torch.exp(m[i, j]) for j in range(len(m))))
    return total


def slow_siglip(s):
    total = 0
    for i in range(len(s)):
        for j in range(len(s)):
            z = 1 if i == j else -1
            total -= torch.log(1 / (1 + torch.exp(-z * s[i, j])))
    return total


def slow_dcl(s):
    total = 0
    for m in (s, s.T):
        for i in range(len(m)):
            total -= torch.log(torch.exp(m[i, i]) / sum(torch.exp(m[i, j]) for j in range(len(m)) if j != i))
    return total


def slow_soft_infonce(s, alpha=0.9, beta=1.0, temperature=1.0):
    total = 0
    for m in (s, s.T):
        for i in range(len(m)):
            others = [j for j in range(len(m)) if j != i]
            normal = sum(math.exp(m[i, j] / temperature) for j in others)
            denominator = torch.exp(m[i, i])
            for j in others:
                relevance = math.exp(m[i, j] / temperature) / normal
                denominator = denominator + (beta - alpha * relevance) / (beta - alpha / len(others)) * torch.exp(m[i, j])
            total -= torch.log(torch.exp(m[i, i]) / denominator)
    return total


def slow_mv_infonce(s):
    views, items = s.shape[0], s.shape[2]
    total = 0
    for i in range(items):
        positive = sum(torch.exp(s[a, b, i, i]) for a in range(views) for b in range(views) if a != b)
        everything = 0
        for a in range(views):
            for b in range(views):
                everything += sum(torch.exp(s[a, b, i, j]) for j in range(items) if (a, i) != (b, j))
        total -= torch.log(positive / everything)
    return total


SLOW = {
    "clip": slow_clip,
    "siglip": slow_siglip,
    "dcl": slow_dcl,
    "soft_infonce": slow_soft_infonce,
    "soft_infonce sharper": lambda s: slow_soft_infonce(s, 0.5, 0.8, 2.0),
    "mv_infonce": slow_mv_infonce,
}


def test_every_loss_of_the_package_is_tested_here():
    ours = {name: kind for name, kind in Loss.kinds.items() if kind.__module__.startswith("ecif.")}
    assert ours == {name: type(LOSSES[name]) for name in ours}
    assert {name for name, kind in ours.items() if kind.two_tower} == set(TWO_TOWER)


@pytest.mark.parametrize("name", TWO_TOWER)
def test_the_losses_that_need_a_bias_are_those_that_see_one(name):
    s = similarity(name)
    assert torch.allclose(LOSSES[name].batch_loss(s + 0.5), LOSSES[name].batch_loss(s)) == (not LOSSES[name].has_bias)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_its_formula(name):
    assert torch.allclose(LOSSES[name].batch_loss(similarity(name)), SLOW[name](similarity(name)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("items", [2, 3, B])
def test_both_parts_are_exactly_what_deletion_takes_away(name, items):
    s, loss = similarity(name, items), LOSSES[name]
    kept = [[i for i in range(items) if i != n] for n in range(items)]
    left = [s[..., rows, :][..., :, rows] for rows in kept]
    # The formula of DCL has no value for a pair that is alone; the loss says 0.
    after = [0 if name == "dcl" and items == 2 else SLOW[name](rest) if items > 2 else loss.batch_loss(rest) for rest in left]
    truth = torch.stack([SLOW[name](s) - value for value in after])
    assert torch.allclose(loss.pair_loss(s) + loss.negative_loss(s), truth)


@pytest.mark.parametrize("name", LOSSES)
def test_the_positive_part_is_the_terms_with_the_item_as_positive(name):
    s, loss = similarity(name), LOSSES[name]
    if name == "siglip":
        assert torch.allclose(loss.pair_loss(s), torch.stack([-torch.log(torch.sigmoid(s[n, n])) for n in range(B)]))
        assert torch.allclose(loss.pair_loss(s).sum() + loss.negative_loss(s).sum() / 2, loss.batch_loss(s))
    else:
        assert torch.allclose(loss.pair_loss(s).sum(), loss.batch_loss(s))


@pytest.mark.parametrize("name", LOSSES)
def test_closed_forms_are_the_contracts_defaults(name):
    s, tangent, loss = similarity(name), move(name), LOSSES[name]
    assert torch.allclose(loss.negative_loss(s), Loss.negative_loss(loss, s))
    assert torch.allclose(loss.cotangent(s), Loss.cotangent(loss, s))
    if name != "mv_infonce":  # which is not convex: its own test is below
        assert torch.allclose(loss.gauss_newton_cotangent(s, tangent), Loss.gauss_newton_cotangent(loss, s, tangent))

    class Plain(type(loss)):
        """The same loss without its closed forms."""

        negative_loss = Loss.negative_loss
        pair_derivatives = Loss.pair_derivatives

    plain = Plain(**vars(loss))
    for closed, default in zip(loss.pair_derivatives(s, tangent), plain.pair_derivatives(s, tangent), strict=True):
        assert torch.allclose(closed, default)


@pytest.mark.parametrize("name", [*TWO_TOWER, "soft_infonce sharper"])
@pytest.mark.parametrize("items", [1, 2, B])
def test_a_pairs_own_loss_depends_on_its_row_and_its_column_alone(name, items, monkeypatch):
    monkeypatch.setattr("ecif.losses.contract.ENTRIES", 3 * B * B)
    s, loss = similarity(name, items), LOSSES[name]
    truth = jacrev(loss.pair_loss)(s)
    for cotangents in (loss.pair_cotangents(s), Loss.pair_cotangents(loss, s)):
        for n in range(items):
            whole = torch.zeros_like(s)
            whole[n] += cotangents[0][n]
            whole[:, n] += cotangents[1][n]
            assert torch.allclose(whole, truth[n])
        assert cotangents[1].diagonal().tolist() == [0.0] * items


@pytest.mark.parametrize("name", ["clip", "siglip", "dcl", "mv_infonce"])
def test_derivatives_against_finite_differences(name):
    s, tangent, loss, h = similarity(name), move(name), LOSSES[name], 1e-6
    positive, negative = loss.pair_derivatives(s, tangent)
    for part, derivative in ((loss.pair_loss, positive), (loss.negative_loss, negative)):
        slope = (part(s + h * tangent) - part(s - h * tangent)) / (2 * h)
        assert torch.allclose(derivative, slope, rtol=1e-5, atol=1e-7)
    slope = (loss.batch_loss(s + h * tangent) - loss.batch_loss(s - h * tangent)) / (2 * h)
    assert torch.allclose((loss.cotangent(s) * tangent).sum(), slope, rtol=1e-6)


def test_the_weights_of_soft_infonce_are_constants_to_its_derivatives():
    s, tangent, h = similarity("soft_infonce"), move("soft_infonce"), 1e-6
    loss = SoftInfoNCE()

    def held(at, here, n=None):
        """L at `at` with the weights of `here`, without item n."""
        if n is not None:
            at, here = without(at, n), without(here, n)
        total = 0
        for a, w in ((at, here), (at.T, here.T)):
            off = ~torch.eye(len(a), dtype=torch.bool)
            r = w.masked_fill(~off, -torch.inf).softmax(1)
            weights = torch.where(off, (1 - 0.9 * r) / (1 - 0.9 / (len(a) - 1)), 1.0)
            total = total + ((weights * a.exp()).sum(1).log() - a.diagonal()).sum()
        return total

    def slope(n):
        return (held(s + h * tangent, s, n) - held(s - h * tangent, s, n)) / (2 * h)

    assert torch.allclose((loss.cotangent(s) * tangent).sum(), slope(None), rtol=1e-6)
    both = reduce(operator.add, loss.pair_derivatives(s, tangent))
    assert torch.allclose(both, torch.stack([slope(None) - slope(n) for n in range(B)]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_is_symmetric_and_positive_semidefinite(name):
    s, loss = similarity(name, items=4), LOSSES[name]
    basis = torch.eye(s.numel(), dtype=s.dtype).view(-1, *s.shape)
    matrix = torch.stack([loss.gauss_newton_cotangent(s, e).flatten() for e in basis])
    assert torch.allclose(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_mv_infonces_gauss_newton_takes_the_log_sum_exp_over_views_for_the_output():
    s, tangent = similarity("mv_infonce", items=3), move("mv_infonce")[..., :3, :3]

    def merged(t):
        pairs = [(a, b) for a in range(V) for b in range(V)]
        rows = [[sum(t[a, b, i, j].exp() for a, b in pairs if (a, i) != (b, j)).log() for j in range(3)] for i in range(3)]
        return torch.stack([torch.stack(row) for row in rows])

    jacobian = jacrev(merged)(s).reshape(9, -1)
    curvature = hessian(lambda m: m.logsumexp(1).sum() - m.trace())(merged(s)).reshape(9, 9)
    truth = jacobian.T @ curvature @ jacobian @ tangent.flatten()
    assert torch.allclose(MvInfoNCE().gauss_newton_cotangent(s, tangent).flatten(), truth)


@pytest.mark.parametrize("name", LOSSES)
def test_an_item_alone_in_its_batch_is_nobodys_negative(name):
    s, loss = similarity(name, items=1), LOSSES[name]
    tangent = torch.ones_like(s)
    positive, negative = loss.pair_derivatives(s, tangent)
    assert negative.tolist() == [0.0] == loss.negative_loss(s).tolist()
    assert torch.allclose((loss.cotangent(s) * tangent).sum(), positive.sum())
    assert loss.gauss_newton_cotangent(s, tangent).isfinite().all()
    assert loss.batch_loss(s[..., :0, :0]) == 0


@pytest.mark.parametrize("name", TWO_TOWER)
def test_single_precision_survives_a_confident_wrong_pair(name):
    s, tangent, loss = similarity(name), move(name), LOSSES[name]
    s[2, 5] += 60  # 1 - P is 0 in single precision
    truth = [loss.negative_loss(s), *loss.pair_derivatives(s, tangent)]
    direct = torch.stack([loss.batch_loss(s) - loss.batch_loss(without(s, n)) for n in range(B)]) - loss.pair_loss(s)
    assert torch.allclose(truth[0], direct)
    s, tangent = s.float(), tangent.float()
    for single, double in zip([loss.negative_loss(s), *loss.pair_derivatives(s, tangent)], truth, strict=True):
        assert torch.allclose(single.double(), double, rtol=1e-4, atol=1e-4)


def test_soft_infonce_without_weights_is_clip_and_without_their_denominator_dcl_is():
    s = similarity("clip")
    assert torch.allclose(SoftInfoNCE(alpha=0.0).batch_loss(s), Clip().batch_loss(s))
    own = s - torch.diag(s.diagonal()) + torch.diag(torch.full((B,), -40.0, dtype=s.dtype))  # a positive that weighs nothing
    assert torch.allclose(Dcl().batch_loss(s), Clip().batch_loss(own) + 2 * (own - s).trace())


@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"alpha": -0.1}, {"temperature": 0.0}])
def test_weights_that_could_be_negative_are_refused(settings):
    with pytest.raises(ValueError, match="alpha < beta"):
        SoftInfoNCE(**settings)


PAIRS, CLEAN, D = 32, 24, 4


@pytest.mark.parametrize("loss", [SigLip(), Dcl()], ids=["siglip", "dcl"])
def test_influence_predicts_retraining_without_each_pair(loss):
    """S_ij = t_i^T W x_j + b is linear in (W, b): with a ridge every training ends in its one minimum."""
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(PAIRS + CLEAN, 4, generator=g, dtype=torch.float64)
    images, texts = (torch.tanh(latent @ torch.randn(4, D, generator=g, dtype=torch.float64)) for _ in range(2))
    texts[:5] = texts[:5].roll(1, 0)  # wrong captions
    batches = list(torch.randperm(PAIRS, generator=g).split(8))

    def logits(w, rows):
        return texts[rows] @ w[:-1].view(D, D) @ images[rows].T + w[-1]

    def objective(w, batches):
        return sum(loss.batch_loss(logits(w, b)) for b in batches) + w @ w / 2

    def train(batches, w, curvature=None):
        """Newton's method; from next to the minimum with the curvature held, which takes more steps and no Hessian."""
        for _ in range(100):
            slope = grad(objective)(w, batches)
            if slope.norm() < 1e-8:
                return w
            step, scale = torch.linalg.solve(hessian(objective)(w, batches) if curvature is None else curvature, slope), 1.0
            while objective(w - scale * step, batches) > objective(w, batches) + 1e-12:
                scale /= 2
            w = w - scale * step
        raise AssertionError("the convex problem was not solved")

    def target(w):
        return sum(loss.batch_loss(logits(w, rows)) for rows in torch.arange(PAIRS, PAIRS + CLEAN).split(8))

    w = train(batches, torch.zeros(D * D + 1, dtype=torch.float64))
    curvature = hessian(objective)(w, batches)
    direction = torch.linalg.solve(curvature, grad(target)(w))
    truth, positive, both = [], [], []
    for m, rows in enumerate(batches):
        parts = loss.pair_derivatives(logits(w, rows), logits(direction, rows))
        positive += parts[0].tolist()
        both += sum(parts).tolist()
        for n in range(len(rows)):
            rest = [rows[torch.arange(len(rows)) != n] if i == m else b for i, b in enumerate(batches)]
            truth.append((target(train(rest, w, curvature)) - target(w)).item())
    agreement = {"both": spearmanr(both, truth)[0], "positive only": spearmanr(positive, truth)[0]}
    print(type(loss).__name__, agreement)
    assert agreement["both"] >= 0.85
    assert agreement["both"] > agreement["positive only"]
