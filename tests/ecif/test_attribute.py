"""What the method in memory refuses before it computes anything."""

import pytest
import torch

import ecif


def test_a_shard_of_one_pair():
    images, texts = torch.eye(6), torch.eye(6)
    heads = ecif.Heads(torch.eye(6), torch.eye(6), logit_scale=10.0)
    with pytest.raises(ValueError, match="2 shards have one pair, such as 'b': no other pair to contrast it with"):
        ecif.attribute(images, texts, {"clean": ecif.Contrastive(images, texts)}, heads=heads, shards=list("aaaabc"))
