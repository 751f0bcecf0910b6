"""Second-order influence against really training again without each pair, and its parts against their slow definitions.

S_ij = t_i^T W x_j is linear in W, so the ridge-regularised InfoNCE is convex and every training ends in its one minimum.
"""

from functools import cached_property

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch.func import grad, hessian, jacrev

from ecif.heads import embed
from ecif.losses.contrastive import batch_loss, loss_cotangent, pair_derivatives
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import identity_projection
from ecif.projected.second_order import RemovalSteps, _galerkin, _Leaving, _Weights, correction, removal_steps, target_change
from tests.support.problems import flat, random_features, random_heads, slow_logits, slow_loss, without

TRAIN, HELD_OUT, D_IMAGE, D_TEXT, DAMPING = 96, 48, 11, 9, 1.0


class Batch:
    """A batch whose derivatives are all written down: J [B, B, k]."""

    def __init__(self, logits, jacobian):
        self.logits, self.jacobian = logits, jacobian

    @cached_property
    def row_mean(self):
        return torch.einsum("ij,ijk->ik", self.logits.softmax(1), self.jacobian)

    @cached_property
    def column_mean(self):
        return torch.einsum("ij,ijk->jk", self.logits.softmax(0), self.jacobian)

    def entries(self, i, j):
        return self.jacobian[i, j]

    def gradient(self):
        return torch.einsum("ij,ijk->k", loss_cotangent(self.logits), self.jacobian)

    def curvature(self):
        """Gauss-Newton: d2L/dS2 differentiated by autograd, between two Jacobians."""
        b = len(self.logits)
        second = hessian(batch_loss)(self.logits).view(b * b, b * b)
        j = self.jacobian.flatten(0, 1)
        return j.T @ second @ j

    def pair_gradients(self):
        """(grad Pos, grad Neg), each [B, k], one coordinate after the other."""
        along = [pair_derivatives(self.logits, tangent) for tangent in self.jacobian.unbind(2)]
        return tuple(torch.stack(part, 1) for part in zip(*along, strict=True))

    def without(self, n):
        kept = torch.arange(len(self.logits)) != n
        return Batch(self.logits[kept][:, kept], self.jacobian[kept][:, kept])

    def to(self, dtype):
        return Batch(self.logits.to(dtype), self.jacobian.to(dtype))


def random_batch(pairs=7, size=6, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(pairs, pairs, generator=g, dtype=torch.float64)
    return Batch(logits, torch.randn(pairs, pairs, size, generator=g, dtype=torch.float64))


def inverse(matrix):
    return lambda rows: torch.linalg.solve(matrix.to(rows), rows.T).T


def leaving_curvature(batch):
    """H_n [B, k, k] as removal_steps has it."""
    pairs = torch.arange(len(batch.logits))
    curvature = _Leaving.of(batch, _Weights.of(batch.logits), pairs)
    size = batch.jacobian.shape[2]
    factors = curvature.factor(torch.eye(size, dtype=batch.logits.dtype).expand(len(pairs), size, size))
    return factors @ factors.mT


def renormalised_curvature(batch, n):
    """The line of H_n that removal_steps leaves out, term by term."""
    rest = batch.without(n)
    kept = [k for k in range(len(batch.logits)) if k != n]
    p, q = batch.logits.softmax(1), batch.logits.softmax(0)
    total = 0
    for r, k in enumerate(kept):
        row = rest.jacobian[r] - rest.row_mean[r]
        column = rest.jacobian[:, r] - rest.column_mean[r]
        total = total + p[k, n] * row.T @ torch.diag(rest.logits.softmax(1)[r]) @ row
        total = total + q[n, k] * column.T @ torch.diag(rest.logits.softmax(0)[:, r]) @ column
    return total


# --- against retraining


class Convex:
    """A training set of pairs with swapped captions and near duplicates, its minimum, and what it is without each pair."""

    def __init__(self, batch_size, seed=0):
        g = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        latent = randn(TRAIN + HELD_OUT, 6)
        self.images, self.texts = (
            torch.tanh(latent @ randn(6, d - 1)) + 0.3 * randn(TRAIN + HELD_OUT, d - 1) for d in (D_IMAGE, D_TEXT)
        )
        swapped = torch.randperm(TRAIN, generator=g)[:18]
        self.texts[swapped] = self.texts[swapped.roll(1)]
        twins = torch.randperm(TRAIN, generator=g)[:20].view(2, 10)  # hard negatives of each other
        for features in (self.images, self.texts):
            features[twins[0]] = features[twins[1]] + 0.05 * randn(10, features.shape[1])
        constant = torch.full((TRAIN + HELD_OUT, 1), 2.0, dtype=torch.float64)
        self.images, self.texts = torch.cat([self.images, constant], 1), torch.cat([self.texts, constant], 1)
        rows = torch.randperm(TRAIN, generator=g).split(batch_size)
        self.jacobians = [self.jacobian(b) for b in rows]
        held_out = self.jacobian(torch.arange(TRAIN, TRAIN + HELD_OUT))

        self.w = self.train(self.jacobians, torch.zeros(D_TEXT * D_IMAGE, dtype=torch.float64))
        self.batches = [Batch(j @ self.w, j) for j in self.jacobians]
        self.target = Batch(held_out @ self.w, held_out)
        self.places = [(m, n) for m, b in enumerate(self.batches) for n in range(len(b.logits))]
        self.left = [[*self.other(m), self.batches[m].without(n).jacobian] for m, n in self.places]
        self.after = [self.train(left, self.w) for left in self.left]
        self.truth = torch.stack([batch_loss(held_out @ w) for w in self.after]) - batch_loss(self.target.logits)

    def jacobian(self, rows):
        return torch.einsum("ia,jb->ijab", self.texts[rows], self.images[rows]).flatten(2)

    def other(self, m):
        return self.jacobians[:m] + self.jacobians[m + 1 :]

    @staticmethod
    def objective(jacobians, w):
        return sum(batch_loss(j @ w) for j in jacobians) + DAMPING / 2 * w @ w

    @staticmethod
    def derivatives(jacobians, w):
        """Loss, gradient and Hessian, the latter written out: autograd takes seconds a step."""
        loss, gradient, curvature = DAMPING / 2 * w @ w, DAMPING * w, DAMPING * torch.eye(len(w), dtype=w.dtype)
        for j in jacobians:
            batch = Batch(j @ w, j)
            weight = batch.logits.softmax(1) + batch.logits.softmax(0)
            loss = loss + batch_loss(batch.logits)
            gradient = gradient + batch.gradient()
            flat = j.flatten(0, 1)
            curvature = curvature + flat.T @ (weight.view(-1, 1) * flat)
            curvature = curvature - batch.row_mean.T @ batch.row_mean - batch.column_mean.T @ batch.column_mean
        return loss, gradient, curvature

    def train(self, jacobians, w):
        for _ in range(100):  # damped Newton
            loss, gradient, curvature = self.derivatives(jacobians, w)
            if gradient.norm() < 1e-8:
                return w
            step, scale = torch.linalg.solve(curvature, gradient), 1.0
            while self.objective(jacobians, w - scale * step) > loss + 1e-10:
                scale /= 2
            w = w - scale * step
        raise AssertionError("the convex problem was not solved")

    def curvature(self):
        return self.derivatives(self.jacobians, self.w)[2]

    def second_order(self, basis=None):
        """Second-order influence of every pair in the coordinates `basis` [all, k]; None for all parameters."""
        basis = torch.eye(len(self.w), dtype=torch.float64) if basis is None else basis
        solve = inverse(basis.T @ self.curvature() @ basis)
        gradient, curvature = self.target.gradient() @ basis, basis.T @ self.target_curvature @ basis
        scores = []
        for batch in self.batches:
            projected = Batch(batch.logits, batch.jacobian @ basis)
            positive, negative = (part @ basis for part in batch.pair_gradients())
            steps = removal_steps(projected, positive, negative, solve)
            scores.append(sum(target_change(steps, gradient[None], curvature[None]))[0])
        return torch.cat(scores)

    def held_out(self):
        """First- and second-order influence of every pair under the minimum that was found without it."""
        scores = []
        for (m, n), left, w in zip(self.places, self.left, self.after, strict=True):
            batch, target = (Batch(j @ w, j) for j in (self.batches[m].jacobian, self.target.jacobian))
            solve = inverse(self.derivatives(left, w)[2])
            curvature = self.derivatives([target.jacobian], w)[2] - DAMPING * torch.eye(len(w), dtype=w.dtype)
            mine = torch.tensor([n])
            positive, negative = (part[mine] for part in batch.pair_gradients())
            first = (positive + negative) @ solve(target.gradient()[None])[0]
            added = correction(batch, positive, negative, solve, target.gradient(), curvature, held_out=True, pairs=mine)
            scores.append(torch.cat([first, first + added[0] + added[1]]))
        return torch.stack(scores, 1)

    def first_order(self, basis):
        q = torch.linalg.solve(basis.T @ self.curvature() @ basis, basis.T @ self.target.gradient())
        return torch.cat([sum(batch.pair_gradients()) @ basis @ q for batch in self.batches])

    @cached_property
    def target_curvature(self):
        return self.derivatives([self.target.jacobian], self.w)[2] - DAMPING * torch.eye(len(self.w), dtype=torch.float64)

    def scores(self):
        h, g_target = self.curvature(), self.target.gradient()
        whole = lambda batch: self.derivatives([batch.jacobian], self.w)[2]  # noqa: E731
        parts = [batch.pair_gradients() for batch in self.batches]
        positive, both = torch.cat([p for p, _ in parts]), torch.cat([p + n for p, n in parts])
        fisher = DAMPING * torch.eye(len(h), dtype=h.dtype) + positive.T @ positive
        newton = []
        for batch, (p, n) in zip(self.batches, parts, strict=True):
            left = [h - whole(batch) + whole(batch.without(i)) for i in range(len(p))]
            newton += torch.linalg.solve(torch.stack(left), p + n)
        newton = torch.stack(newton)
        q = torch.linalg.solve(h, g_target)
        return {
            "no curvature (TracIn)": both @ g_target,
            "empirical Fisher": both @ torch.linalg.solve(fisher, g_target),
            "positive only": positive @ q,
            "first order": both @ q,
            "second order": self.second_order(),
            "H - H_n factored for each pair": newton @ g_target + ((newton @ self.target_curvature) * newton).sum(1) / 2,
        }


@pytest.fixture(scope="module", params=[16, 32])
def convex(request):
    return request.param, Convex(request.param)


def test_second_order_agrees_with_retraining(convex):
    batch_size, problem = convex
    agreement = {}
    print(f"\nbatches of {batch_size:<24d} pearson spearman   slope")
    for name, x in problem.scores().items():
        slope = x @ problem.truth / (problem.truth @ problem.truth)
        agreement[name] = (pearsonr(x, problem.truth)[0], spearmanr(x, problem.truth)[0], slope.item())
        print(f"{name:34s}" + "".join(f"{value:9.3f}" for value in agreement[name]))
    pearson, _, slope = agreement["second order"]
    assert pearson >= 0.99
    assert 0.93 <= slope <= 1.07
    assert agreement["first order"][1] >= 0.85
    assert agreement["first order"][1] > agreement["positive only"][1]


def test_a_held_out_pair_brings_its_curvature_along(convex):
    batch_size, problem = convex
    print(f"\nheld out, batches of {batch_size:<14d} pearson   slope")
    slopes = []
    for name, x in zip(("first order", "second order"), problem.held_out(), strict=True):
        pearson = pearsonr(x, problem.truth)[0]
        slopes.append((x @ problem.truth / (problem.truth @ problem.truth)).item())
        print(f"{name:34s}{pearson:9.3f}{slopes[-1]:9.3f}")
    assert pearson >= 0.99
    assert 0.9 <= slopes[1] <= 1.15
    assert slopes[0] > 1.5  # where the pairs are fitted, first order says too little; where they are held out, too much


def test_in_a_projection_the_difference_of_the_orders_improves_the_exact_first_order(convex):
    _, problem = convex
    truth, everything = problem.truth, torch.eye(len(problem.w), dtype=torch.float64)
    exact = problem.first_order(everything)
    g = torch.cat([sum(batch.pair_gradients()) for batch in problem.batches])
    axes = torch.linalg.eigh(g.T @ g)[1].flip(1)
    for size in (12, 50):
        basis = axes[:, :size]
        second = problem.second_order(basis)
        assert pearsonr(exact + second - problem.first_order(basis), truth)[0] > pearsonr(exact, truth)[0]
        assert pearsonr(exact, truth)[0] > pearsonr(second, truth)[0]


# --- the parts against their definitions


def test_what_leaves_is_the_change_of_the_batch_curvature_up_to_the_renormalisation():
    batch = random_batch()
    whole = batch.curvature()
    for n, leaving in enumerate(leaving_curvature(batch)):
        torch.testing.assert_close(leaving - renormalised_curvature(batch, n), whole - batch.without(n).curvature())


def test_what_is_left_stays_positive_definite():
    for scale in (0.1, 3.0, 30.0):
        batch = random_batch(scale=scale)
        left = batch.curvature() - leaving_curvature(batch)
        assert torch.linalg.eigvalsh(left).min() > -1e-10


def test_adjoint_of_the_factor():
    batch = random_batch()
    curvature = _Leaving.of(batch, _Weights.of(batch.logits), torch.arange(7))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.einsum("nab,nb->na", leaving_curvature(batch), x)
    torch.testing.assert_close(curvature.adjoint(curvature.factor(x[:, None])[:, 0]), expected)


def test_a_span_of_all_coordinates_gives_the_factored_step():
    batch = random_batch(size=2)  # two parts span both coordinates
    positive, negative = batch.pair_gradients()
    h = batch.curvature() + torch.eye(2, dtype=torch.float64)
    steps = removal_steps(batch, positive, negative, inverse(h))
    left = h - leaving_curvature(batch)
    torch.testing.assert_close(steps.positive, torch.linalg.solve(left, positive))
    torch.testing.assert_close(steps.negative, torch.linalg.solve(left, negative))
    torch.testing.assert_close(steps.leverage, 1 - torch.linalg.eigvals(torch.linalg.solve(h, left)).real.amin(1))


def test_with_much_damping_the_step_is_the_first_order_one_and_its_error_falls_with_the_square():
    batch = random_batch(size=12)
    positive, negative = batch.pair_gradients()
    errors = []
    for damping in (1e3, 1e4):
        h = batch.curvature() + damping * torch.eye(12, dtype=torch.float64)
        steps = removal_steps(batch, positive, negative, inverse(h))
        torch.testing.assert_close(steps.positive, inverse(h)(positive), rtol=0.1, atol=0.1 / damping)
        exact = torch.linalg.solve(h - leaving_curvature(batch), positive + negative)
        errors.append(((steps.positive + steps.negative - exact).norm() / exact.norm()).item())
    assert errors[1] < 2e-2 * errors[0]  # terms up to H_n exact: what is missing is H_n^2, relative to the step


def test_target_change_is_that_of_a_quadratic_loss():
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    steps = RemovalSteps(randn(3, 4), randn(3, 4), torch.zeros(3))
    gradients, roots = randn(2, 4), randn(2, 4, 4)
    curvatures = roots @ roots.mT
    positive, negative = target_change(steps, gradients, curvatures)
    for t in range(2):
        for n in range(3):
            move = steps.positive[n] + steps.negative[n]
            expected = gradients[t] @ move + move @ curvatures[t] @ move / 2
            torch.testing.assert_close(positive[t, n] + negative[t, n], expected)


def test_the_heads_curvature_without_a_pair():
    """On real cosine heads: what leaves is the change of J^T (d2L/dS2) J when the pair's row and column are deleted."""
    heads, (images, texts) = random_heads(), random_features(5)
    weights = flat(heads)
    jacobian = jacrev(lambda w: slow_logits(heads, w, images, texts))(weights)
    batch = Batch(slow_logits(heads, weights, images, texts), jacobian)
    positive, negative = batch.pair_gradients()
    removed = lambda w, n: slow_loss(s := slow_logits(heads, w, images, texts)) - slow_loss(without(s, n))  # noqa: E731
    torch.testing.assert_close(positive[2] + negative[2], grad(removed)(weights, 2))
    h = batch.curvature() + torch.eye(heads.size, dtype=torch.float64)
    steps = removal_steps(batch, positive, negative, inverse(h))
    left = h - leaving_curvature(batch)
    exact = torch.linalg.solve(left, positive + negative)
    # Three directions out of 65: better than the first order's, in the norm that the step minimises.
    error = lambda step: torch.einsum("na,nab,nb->n", step - exact, left, step - exact)  # noqa: E731
    assert (error(steps.positive + steps.negative) < 0.1 * error(inverse(h)(positive + negative))).all()
    # The index's batches, which form no Jacobian, give the same steps.
    projected = project_batch(heads, embed(heads, images, texts), identity_projection(heads))
    for a, b in zip(removal_steps(projected, *pair_gradients(projected), inverse(h)), steps, strict=True):
        torch.testing.assert_close(a, b)


# --- at the edges of the numbers


def test_a_confident_wrong_pair_gives_finite_steps_in_float32():
    batch = random_batch(scale=1.0)
    batch.logits[1, 4] += 200.0  # P_14 = 1 to the last bit
    positive, negative = batch.pair_gradients()
    h = batch.curvature() + torch.eye(6, dtype=torch.float64)
    double = removal_steps(batch, positive, negative, inverse(h))
    single = removal_steps(batch.to(torch.float32), positive.float(), negative.float(), inverse(h))
    assert single.positive.dtype == torch.float32
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def test_parallel_and_zero_parts():
    batch = random_batch()
    positive, negative = batch.pair_gradients()
    h = batch.curvature() + torch.eye(6, dtype=torch.float64)
    steps = removal_steps(batch, positive, negative, inverse(h))
    both = removal_steps(batch, positive + negative, torch.zeros_like(negative), inverse(h))
    doubled = removal_steps(batch, positive, 2 * positive, inverse(h))
    torch.testing.assert_close(doubled.negative, 2 * doubled.positive)
    assert (both.negative == 0).all()
    # Less to choose from, still the same direction of effect.
    assert torch.nn.functional.cosine_similarity(both.positive, steps.positive + steps.negative).min() > 0.9
    nothing = torch.zeros_like(positive)
    still = removal_steps(batch, nothing, nothing, inverse(h))
    assert all((part == 0).all() for part in still)


def test_leverage_is_capped_where_more_curvature_leaves_than_there_is():
    batch = random_batch()
    positive, negative = batch.pair_gradients()
    little = 1e-3 * torch.eye(6, dtype=torch.float64)  # an H that has never seen this batch
    steps = removal_steps(batch, positive, negative, inverse(little), max_leverage=0.9)
    assert (steps.leverage > 1).all()
    first = inverse(little)(positive + negative)
    assert ((steps.positive + steps.negative).norm(dim=1) <= 10.001 * first.norm(dim=1)).all()
    uncapped = removal_steps(batch, positive, negative, inverse(batch.curvature() + 5 * little), max_leverage=0.999)
    assert (uncapped.leverage < 1).all()
    none = removal_steps(batch, positive, negative, inverse(little), max_leverage=0.0)
    torch.testing.assert_close(none.positive, inverse(little)(positive))


def test_pairs_are_taken_in_chunks_without_a_difference(monkeypatch):
    batch = random_batch()
    positive, negative = batch.pair_gradients()
    solve = inverse(batch.curvature() + torch.eye(6, dtype=torch.float64))
    whole = removal_steps(batch, positive, negative, solve)
    monkeypatch.setattr("ecif.projected.second_order.ENTRIES_AT_ONCE", 3 * 2 * 7 * 6)
    for a, b in zip(removal_steps(batch, positive, negative, solve), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_say_what_is_wrong():
    batch = random_batch()
    positive, negative = batch.pair_gradients()
    with pytest.raises(ValueError, match="do not fit"):
        removal_steps(batch, positive[:3], negative[:3], lambda g: g)
    with pytest.raises(ValueError, match="one pair"):
        removal_steps(Batch(batch.logits[:1, :1], batch.jacobian[:1, :1]), positive[:1], negative[:1], lambda g: g)
    with pytest.raises(ValueError, match="max_leverage"):
        removal_steps(batch, positive, negative, lambda g: g, max_leverage=1.0)
    with pytest.raises(ValueError, match="not finite"):
        removal_steps(batch, positive * float("nan"), negative, lambda g: g)


def test_the_small_system_is_solved_in_float64_whatever_comes_in():
    whole, leaving = torch.eye(3).expand(2, 3, 3), 0.5 * torch.eye(3).expand(2, 3, 3)
    coefficients, leverage = _galerkin(whole, leaving, 0.95)
    assert coefficients.dtype == torch.float64
    torch.testing.assert_close(coefficients, 2 * torch.eye(3, dtype=torch.float64)[:, :2].expand(2, 3, 2))
    torch.testing.assert_close(leverage, torch.full((2,), 0.5, dtype=torch.float64))
