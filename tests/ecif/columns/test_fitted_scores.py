"""`held_out_cosine` and `held_out_loss` are the numbers that the influence columns are computed beside."""

import pytest
import torch

from ecif.columns import HeldOutCosine, HeldOutLoss, held_out_values
from ecif.heads import embed
from ecif.heads.influence import score
from ecif.losses import Clip, Dcl, Loss, SigLip, SoftInfoNCE
from tests.support.problems import held_out_pairs, random_heads

FITTED = [[random_heads(10 * fold + seed) for seed in range(3)] for fold in range(3)]


@pytest.mark.parametrize("loss", [Clip(), SigLip(), Dcl(), SoftInfoNCE()], ids=lambda loss: loss.name)
def test_they_are_those_of_influence_fold_by_fold_mean_over_the_seeds(loss: Loss):
    pairs = held_out_pairs(loss=loss)
    truth = torch.full((2, 12), torch.nan, dtype=torch.float64)
    for fold, seeds in enumerate(FITTED):
        own = pairs.fold == fold
        scores = [score(h, embed(h, pairs.images, pairs.texts), pairs.batches, torch.empty(0, h.size), loss) for h in seeds]
        truth[0, own] = sum(s.clip_score / 3 for s in scores)[own]
        truth[1, own] = sum(s.pair_loss / 3 for s in scores)[own]
    assert torch.equal(held_out_values(HeldOutCosine(), pairs, FITTED), truth[0])
    assert torch.equal(held_out_values(HeldOutLoss(), pairs, FITTED), truth[1])
