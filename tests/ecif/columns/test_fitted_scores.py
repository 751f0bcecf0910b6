"""`held_out_cosine` and `held_out_loss` against a loop over folds, seeds and batches."""

import pytest
import torch

from ecif.columns import HeldOutCosine, HeldOutLoss, held_out_values
from ecif.heads import embed, logits
from ecif.losses import Clip, Dcl, Loss, SigLip, SoftInfoNCE
from tests.support.problems import held_out_pairs, random_heads

FITTED = [[random_heads(10 * fold + seed) for seed in range(3)] for fold in range(3)]


@pytest.mark.parametrize("loss", [Clip(), SigLip(), Dcl(), SoftInfoNCE()], ids=lambda loss: loss.name)
def test_they_are_means_over_the_seeds_of_heads_without_the_fold(loss: Loss):
    pairs = held_out_pairs(loss=loss)
    times = torch.cat(pairs.batches).bincount()
    truth = torch.zeros(2, 12, dtype=torch.float64)
    for fold, seeds in enumerate(FITTED):
        own = pairs.fold == fold
        for heads in seeds:
            embedded, losses = embed(heads, pairs.images, pairs.texts), torch.zeros(12, dtype=torch.float64)
            for rows in pairs.batches:
                losses[rows] += loss.pair_loss(logits(heads, embedded.take(rows)))
            truth[0, own] += (embedded.u * embedded.v).sum(1)[own] / 3
            truth[1, own] += (losses / times)[own] / 3
    assert torch.allclose(held_out_values(HeldOutCosine(), pairs, FITTED), truth[0])
    assert torch.allclose(held_out_values(HeldOutLoss(), pairs, FITTED), truth[1])
