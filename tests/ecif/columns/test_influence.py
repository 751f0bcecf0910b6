"""The influence columns of a shard: every pair under the heads that did not see its fold."""

import torch

from ecif.columns.influence import held_out_influence
from ecif.heads import embed
from ecif.heads.influence import score
from tests.support.problems import held_out_pairs, random_heads

PAIRS = held_out_pairs()
FITS = [[random_heads(10 * fold + fit) for fit in range(2)] for fold in range(3)]
DIRECTIONS = [torch.randn(3, 2, FITS[0][0].size, generator=torch.Generator().manual_seed(t)).double() for t in range(2)]


def test_it_is_the_mean_over_the_fits_without_a_pairs_fold_each_with_its_own_direction():
    found = held_out_influence(PAIRS, FITS, DIRECTIONS)
    assert found.shape == (2, 2, 12)
    for n, fold in enumerate(PAIRS.fold.tolist()):
        for t, of_target in enumerate(DIRECTIONS):
            parts = []
            for heads, direction in zip(FITS[fold], of_target[fold], strict=True):
                pairs = embed(heads, PAIRS.images, PAIRS.texts)
                alone = score(heads, pairs, PAIRS.batches, direction[None])
                parts.append(torch.stack([alone.positive[0, n], alone.negative[0, n]]))
            assert torch.allclose(found[:, t, n], torch.stack(parts).mean(0))


def test_a_target_s_influence_does_not_depend_on_the_other_targets():
    assert torch.equal(held_out_influence(PAIRS, FITS, DIRECTIONS[1:])[:, 0], held_out_influence(PAIRS, FITS, DIRECTIONS)[:, 1])
    assert held_out_influence(PAIRS, FITS, []).shape == (2, 0, 12)
