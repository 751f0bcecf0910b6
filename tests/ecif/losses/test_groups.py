"""What pairs take away together, against deletion and against training again without them."""

import pytest
import torch
from scipy.stats import pearsonr
from torch.func import grad, hessian

from ecif.losses import CLIP, Clip, Dcl, SigLip
from ecif.losses.contrastive import batch_loss
from ecif.losses.groups import removed_cotangent
from tests.support import convex

S = 3 * torch.randn(9, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def members(*rows):
    leaving = torch.zeros(9, dtype=torch.bool)
    leaving[list(rows)] = True
    return leaving


@pytest.mark.parametrize("leaving", [members(4), members(0, 3, 5), members(*range(8)), members(*range(9))])
@pytest.mark.parametrize("loss", [Clip(), SigLip(), Dcl()])
def test_it_is_the_derivative_of_the_difference_of_the_losses(loss, leaving):
    stays = ~leaving

    def taken(s):
        return loss.batch_loss(s) - (loss.batch_loss(s[stays][:, stays]) if stays.any() else 0)

    ours, step = removed_cotangent(loss, S, leaving), 1e-6
    for i, j in [(4, 4), (0, 3), (3, 8), (1, 2), (7, 0), (8, 8)]:
        moved = torch.zeros_like(S)
        moved[i, j] = step
        slope = (taken(S + moved) - taken(S - moved)) / (2 * step)
        assert torch.allclose(ours[i, j], slope, rtol=1e-5, atol=1e-7)


def test_two_strong_negatives_hold_the_softmax_up_for_each_other():
    s = torch.zeros(9, 9, dtype=torch.float64)
    s[0, 1] = s[0, 2] = 10.0
    own = torch.zeros_like(s)
    own[0, 0] = 1.0  # the pair whose caption they are negatives of comes nearer to its image
    together = (removed_cotangent(CLIP, s, members(1, 2)) * own).sum()
    alone = sum((removed_cotangent(CLIP, s, members(n)) * own).sum() for n in (1, 2))
    assert together.abs() > 5 * alone.abs()


def test_it_predicts_what_training_again_without_half_a_batch_does():
    w = convex.train(convex.BATCHES, torch.zeros(convex.D_TEXT * convex.D_IMAGE, dtype=torch.float64))
    target = lambda v: batch_loss(convex.logits(v, convex.CLEAN))  # noqa: E731
    direction = torch.linalg.solve(hessian(convex.objective)(w, convex.BATCHES), grad(target)(w))
    predicted, truth = [], []
    order = torch.Generator().manual_seed(3)
    for draw in range(15):
        m = draw % len(convex.BATCHES)
        rows = convex.BATCHES[m]
        leaving = torch.randperm(len(rows), generator=order) < 8
        s, tangent = convex.logits(w, rows), convex.logits(direction, rows)
        predicted.append((removed_cotangent(CLIP, s, leaving) * tangent).sum())
        rest = [*convex.BATCHES[:m], rows[~leaving], *convex.BATCHES[m + 1 :]]
        truth.append(target(convex.train(rest, w)) - target(w))
    assert pearsonr(torch.stack(predicted), torch.stack(truth))[0] > 0.9
