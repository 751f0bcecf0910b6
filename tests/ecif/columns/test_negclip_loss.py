"""negCLIPLoss against its definition, written out entry by entry."""

import math

import pytest
import torch

from ecif.columns import NegClipLoss
from ecif.heads import embed
from tests.support.problems import held_out_pairs


def test_it_is_the_cosine_less_the_normaliser_mean_over_the_batches():
    pairs = held_out_pairs()
    tau = 1 / pairs.checkpoint.logit_scale
    embedded = embed(pairs.checkpoint, pairs.images, pairs.texts)
    cosine = (embedded.u @ embedded.v.T).tolist()  # text, image
    values = NegClipLoss().values(pairs)
    for n in range(12):
        of_batches = []
        for rows in (rows.tolist() for rows in pairs.batches):
            if n in rows:
                captions = math.log(sum(math.exp(cosine[i][n] / tau) for i in rows))
                images = math.log(sum(math.exp(cosine[n][j] / tau) for j in rows))
                of_batches.append(cosine[n][n] - tau / 2 * (captions + images))
        assert len(of_batches) == (2 if n else 1)
        assert values[n].item() == pytest.approx(sum(of_batches) / len(of_batches))


def test_a_bias_that_all_logits_share_changes_nothing():
    pairs = held_out_pairs()
    biased = pairs._replace(checkpoint=pairs.checkpoint._replace(logit_bias=-10.0))
    assert torch.equal(NegClipLoss().values(pairs), NegClipLoss().values(biased))
