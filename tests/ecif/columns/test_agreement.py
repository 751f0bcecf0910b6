"""Agreement of an image's and a caption's neighbours, held against a loop and what it is for."""

import math

import pytest
import torch

from ecif.columns.agreement import agreement_with, agreement_with_target
from ecif.columns.bank import NEIGHBOURS, Bank, build_bank
from ecif.evaluation import auroc
from ecif.heads import Heads


def pairs(count: int, concepts: int, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and captions of some concepts in two spaces that have nothing in common, and folds."""
    g = torch.Generator().manual_seed(0)
    concept, towers = torch.arange(count) % concepts, [torch.randn(concepts, d, generator=g) for d in (12, 9)]
    images, texts = (tower[concept] + noise * torch.randn(count, tower.shape[1], generator=g) for tower in towers)
    return images + 3, texts - 1, torch.randint(5, (count,), generator=g)


def bank_of(images: torch.Tensor, texts: torch.Tensor, fold: torch.Tensor) -> Bank:
    """A bank; agreement asks no head."""
    return build_bank(images, texts, fold, Heads(torch.ones(12, 2), torch.ones(9, 2), 1.0))


def test_it_is_the_log_of_how_much_likelier_than_chance_both_name_the_same_pair():
    images, texts, fold = pairs(40, 8)
    bank = bank_of(images, texts, fold)
    found = agreement_with(bank, images, texts, fold)
    sharp = bank.sharpness.tolist()
    centred = [(x - x.mean(0)) / (x - x.mean(0)).norm(dim=1, keepdim=True) for x in (images.double(), texts.double())]
    for n in range(40):
        others = [m for m in range(40) if fold[m] != fold[n]]
        named = []
        for x, s in zip(centred, sharp, strict=True):
            weights = [math.exp(s * float(x[n] @ x[m])) for m in others]
            named.append([w / sum(weights) for w in weights])
        truth = math.log(len(others) * sum(a * b for a, b in zip(*named, strict=True)))
        assert found[n].item() == pytest.approx(truth, abs=0.02)  # the bank is float16


def perplexities(known: torch.Tensor, sharpness: float) -> torch.Tensor:
    likeness = (sharpness * known.float() @ known.float().T).fill_diagonal_(-torch.inf)
    return torch.distributions.Categorical(logits=likeness).entropy().exp()


@pytest.mark.parametrize("count", [400, 1500])
def test_a_typical_pair_has_as_many_neighbours_as_stated(count):
    images, texts, fold = pairs(count, 40)
    images[: count // 4], texts[: count // 4] = images[:1] + images[: count // 4] / 50, texts[:1] + texts[: count // 4] / 50
    bank = bank_of(images, texts, fold)  # its first quarter is another source, much narrower
    for known, sharpness in zip((bank.images, bank.texts), bank.sharpness.tolist(), strict=True):
        assert perplexities(known, sharpness).median().item() == pytest.approx(NEIGHBOURS, rel=0.2)


def test_copies_of_a_caption_are_one():
    """Boilerplate that most pairs have must not make the others' captions name a single neighbour."""
    images, texts, fold = pairs(400, 40)
    sharp = bank_of(images, texts, fold).sharpness
    often = torch.cat([texts, texts[:1].expand(800, -1)])
    more = bank_of(torch.cat([images, images, images]), often - often.mean(0) + texts.mean(0), torch.cat([fold, fold, fold]))
    assert more.sharpness[1] < 3 * sharp[1]


def test_it_finds_swapped_captions():
    images, texts, fold = pairs(400, 40)
    bad = torch.arange(400) < 80
    texts[bad] = texts[bad][torch.randperm(80, generator=torch.Generator().manual_seed(1))]
    found = auroc(-agreement_with(bank_of(images, texts, fold), images, texts, fold), bad)
    assert found > 0.95, found


def test_a_pair_never_meets_its_own_fold():
    images, texts, fold = pairs(40, 8)
    bank = bank_of(images, texts, fold)
    other = bank._replace(images=bank.images.clone(), texts=bank.texts.clone())
    other.images[fold == 2], other.texts[fold == 2] = 0.1, -0.2
    same, changed = (fold == f for f in (2, 3))
    before, after = (agreement_with(b, images, texts, fold) for b in (bank, other))
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[changed], after[changed])


def test_who_is_asked_beside_it_changes_nothing(monkeypatch):
    images, texts, fold = pairs(40, 8)
    bank = bank_of(images, texts, fold)
    together = agreement_with(bank, images, texts, fold)
    monkeypatch.setattr("ecif.columns.agreement.CHUNK", 7)
    assert torch.allclose(agreement_with(bank, images, texts, fold), together, atol=1e-5)
    assert agreement_with(bank, images[:0], texts[:0], fold[:0]).shape == (0,)


def test_pairs_without_anything_to_compare_with_are_finite():
    images, texts, fold = pairs(40, 8)
    alike = bank_of(images, texts[:1].expand(40, -1), fold)
    assert agreement_with(alike, images, texts, fold).isfinite().all()
    assert agreement_with(bank_of(images, texts, torch.zeros(40)), images, texts, torch.zeros(40)).tolist() == [0.0] * 40


@pytest.mark.parametrize("without", [-1, 0, 2])
def test_a_part_of_a_target_that_has_no_say_is_as_good_as_not_there(without):
    """Beyond that, sharpness and centre are those of the whole target."""
    (images, texts, _), part = pairs(60, 8), torch.arange(60) % 3
    bank, asked = bank_of(images, texts, part), part != without
    some = bank.among(asked)
    truth = agreement_with(some, images, texts, torch.full((60,), -1))
    assert agreement_with_target(bank, images, texts, [-1, without])[1].tolist() == pytest.approx(truth.tolist(), abs=1e-5)
