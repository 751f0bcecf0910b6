"""The sampled Gauss-Newton matrix, against the exact one."""

import itertools

import torch

from ecif.projected.curvature import gauss_newton
from ecif.projected.sampled import draw_labels, sampled_gauss_newton
from tests.support.projected import BATCHES, RANDOM, seen


def test_sampled_curvature_is_exact_on_average_over_all_labels():
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
    labels = draw_labels(p, "key", 8000).view(8000, 3)
    counts = torch.stack([(labels == j).double().mean(0) for j in range(3)], dim=1)
    assert torch.allclose(counts, p.double(), atol=0.02)
    assert (counts[p == 0] == 0).all()


def test_a_key_seeds_the_draw():
    batch = seen(BATCHES[0], RANDOM)
    assert torch.equal(sampled_gauss_newton(batch, "shard 0 1"), sampled_gauss_newton(batch, "shard 0 1"))
    assert not torch.equal(sampled_gauss_newton(batch, "shard 0 1"), sampled_gauss_newton(batch, "shard 0 2"))
    assert draw_labels(torch.full((4, 4), 0.25), "shard 0 1", 2).tolist() == [1, 2, 1, 1, 0, 3, 2, 1]  # on every machine
