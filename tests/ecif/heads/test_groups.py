"""The influence of pairs that are removed together, against deletion from the batches' losses."""

import pytest
import torch
from torch.func import grad

from ecif.heads import embed
from ecif.heads.groups import group_influence
from ecif.heads.influence import score
from ecif.losses import Clip, Dcl, SigLip, SoftInfoNCE
from tests.support.problems import flat, random_features, random_heads, slow_logits, slow_loss

HEADS = random_heads()
IMAGES, TEXTS = random_features(18)
PAIRS = embed(HEADS, IMAGES, TEXTS)
BATCHES = list(torch.randperm(18, generator=torch.Generator().manual_seed(1)).split(6))
DIRECTIONS = torch.randn(2, HEADS.size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def members(*rows):
    group = torch.zeros(18, dtype=torch.bool)
    group[torch.as_tensor(rows)] = True
    return group


GROUPS = {
    "one pair": members(4),
    "two of a batch": members(*BATCHES[1][:2].tolist()),
    "across batches": members(0, 3, 5, 8, 11),
    "all but one of a batch": members(*BATCHES[0][1:].tolist()),
    "a whole batch": members(*BATCHES[2].tolist()),
    "everyone": members(*range(18)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_it_is_the_derivative_of_what_the_group_takes_away(name):
    group = GROUPS[name]

    def taken(w):
        total = torch.zeros((), dtype=torch.float64)
        for rows in BATCHES:
            rest = rows[~group[rows]]
            total = total + slow_loss(slow_logits(HEADS, w, IMAGES[rows], TEXTS[rows]))
            if len(rest):
                total = total - slow_loss(slow_logits(HEADS, w, IMAGES[rest], TEXTS[rest]))
        return total

    truth = DIRECTIONS @ grad(taken)(flat(HEADS))
    assert torch.allclose(group_influence(HEADS, PAIRS, BATCHES, DIRECTIONS, group), truth, rtol=1e-9)


@pytest.mark.parametrize("loss", [Clip(), SigLip(), Dcl(), SoftInfoNCE()])
def test_a_group_of_one_is_the_pair_whatever_the_loss(loss):
    scores = score(HEADS, PAIRS, BATCHES, DIRECTIONS, loss)
    for n in (2, 7):
        ours = group_influence(HEADS, PAIRS, BATCHES, DIRECTIONS, members(n), loss)
        assert torch.allclose(ours, (scores.positive + scores.negative)[:, n], rtol=1e-6)


def test_pairs_of_different_batches_add_up_and_pairs_of_one_do_not():
    scores = score(HEADS, PAIRS, BATCHES, DIRECTIONS)
    alone = scores.positive + scores.negative
    apart, together = [BATCHES[0][0], BATCHES[1][0]], BATCHES[0][:2]
    ours = group_influence(HEADS, PAIRS, BATCHES, DIRECTIONS, members(*apart))
    assert torch.allclose(ours, alone[:, apart].sum(1))
    ours = group_influence(HEADS, PAIRS, BATCHES, DIRECTIONS, members(*together.tolist()))
    assert (ours - alone[:, together].sum(1)).abs().max() > 0.05 * ours.abs().max()
