"""What a bank of pairs says of its own pairs and of others."""

import torch
from torch.nn.functional import cosine_similarity

from ecif.columns.bank import build_bank
from tests.support.problems import held_out_pairs, random_heads

PAIRS = held_out_pairs()


def test_it_holds_the_cosine_of_each_pair_under_the_checkpoint():
    heads = random_heads()
    truth = [torch.cosine_similarity(x @ heads.image, t @ heads.text, dim=0) for x, t in zip(*PAIRS[:2], strict=True)]
    assert torch.allclose(build_bank(*PAIRS[:3], heads).cosine, torch.stack(truth))


def test_others_are_compared_with_it_as_it_is_centred():
    bank = PAIRS.bank
    for cosine, features in ((bank.image_cosine, PAIRS.images), (bank.text_cosine, PAIRS.texts)):
        known = features - features.mean(0)
        truth = torch.stack([cosine_similarity(x - features.mean(0), known, dim=1) for x in features[:4]])
        assert torch.allclose(cosine(features[:4]), truth, atol=2e-3)  # the bank is float16


def test_a_pair_must_not_meet_those_of_its_own_fold():
    assert PAIRS.bank.same_fold(torch.tensor([2])).tolist() == [[fold == 2 for fold in PAIRS.fold.tolist()]]
