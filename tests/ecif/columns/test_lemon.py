"""LEMoN against its definition, neighbour by neighbour."""

import math

import pytest
import torch
from torch import Tensor

from ecif.columns import Lemon
from ecif.columns.bank import build_bank
from tests.support.problems import held_out_pairs, random_heads


def distance(a: Tensor, b: Tensor) -> float:
    return 1 - torch.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("count", [24, 120])  # fewer and more than 30 neighbours in the other folds
def test_it_is_the_pairs_own_distance_and_those_to_its_neighbours_partners(count, monkeypatch):
    monkeypatch.setattr("ecif.columns.lemon.CHUNK", 50)
    pairs = held_out_pairs(count)
    heads = pairs.checkpoint
    sides = [side - side.mean(0) for side in (pairs.images, pairs.texts)]
    d_mm = [distance(x @ heads.image, t @ heads.text) for x, t in zip(pairs.images, pairs.texts, strict=True)]
    values = Lemon().values(pairs)
    for n in range(0, count, 7):
        others = [j for j in range(count) if pairs.fold[j] != pairs.fold[n]]
        score = d_mm[n]
        for near, far in (sides, sides[::-1]):
            nearest = sorted(others, key=lambda j, near=near: distance(near[n], near[j]))[:30]
            terms = [
                distance(far[n], far[j]) * math.exp(-0.1 * distance(near[n], near[j])) * math.exp(-5 * d_mm[j]) for j in nearest
            ]
            score += 5 * sum(terms) / len(terms)
        assert values[n].item() == pytest.approx(score, abs=5e-3)  # the bank is float16


def test_a_pair_never_meets_its_own_fold():
    pairs = held_out_pairs(24)
    changed = pairs.bank._replace(images=pairs.bank.images.clone(), cosine=pairs.bank.cosine.clone())
    changed.images[pairs.fold == 2], changed.cosine[pairs.fold == 2] = 0.1, 0.9
    same = Lemon().values(pairs) == Lemon().values(pairs._replace(bank=changed))
    assert torch.equal(same, pairs.fold == 2)


def test_a_pair_that_meets_nobody_has_its_own_distance():
    pairs = held_out_pairs()
    alone = torch.zeros(12, dtype=torch.long)
    bank = build_bank(pairs.images, pairs.texts, alone, random_heads())
    embedded = [side @ head for side, head in zip(pairs[:2], pairs.checkpoint[:2], strict=True)]
    truth = 1 - torch.cosine_similarity(*embedded)
    assert torch.allclose(Lemon().values(pairs._replace(bank=bank, fold=alone)), truth)
