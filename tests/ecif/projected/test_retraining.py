"""Second-order influence against really training again without each pair.

S_ij = t_i^T W x_j is linear in W, so the ridge-regularised InfoNCE is convex and every training ends in its one minimum.
"""

from functools import cached_property

import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from ecif.losses.contrastive import batch_loss
from ecif.projected.second_order import correction, removal_steps, target_change
from tests.support.written_out import Batch, inverse

TRAIN, HELD_OUT, D_IMAGE, D_TEXT, DAMPING = 96, 48, 11, 9, 1.0


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
