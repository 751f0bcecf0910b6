"""What the method in memory refuses before it computes anything."""

import pytest
import torch

import ecif


def test_images_that_are_all_the_same():
    images, texts = torch.ones(20, 6) / 6**0.5, torch.eye(20)
    heads = ecif.Heads(torch.eye(6), torch.ones(20, 6), logit_scale=10.0)
    with pytest.raises(ValueError, match="the images of the 20 sampled pairs are copies of 1: 5 folds need at least 5"):
        ecif.attribute(images, texts, {"clean": ecif.Contrastive(images, texts)}, heads=heads)


def test_a_shard_of_one_pair():
    images, texts = torch.eye(6), torch.eye(6)
    heads = ecif.Heads(torch.eye(6), torch.eye(6), logit_scale=10.0)
    with pytest.raises(ValueError, match="2 shards have one pair, such as 'b': no other pair to contrast it with"):
        ecif.attribute(images, texts, {"clean": ecif.Contrastive(images, texts)}, heads=heads, shards=list("aaaabc"))
