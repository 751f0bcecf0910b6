"""The sample: who gets whose caption, how it is dealt, and that slices of it give what the whole sample gives."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.columns import Agreement, ClipScore, HeldOutCosine, HeldOutLoss
from ecif.columns.agreement import agreement_with
from ecif.columns.bank import build_bank
from ecif.heads import Embedded, Heads, embed, logits
from ecif.heads.cross_fit import FittedHeads
from ecif.heads.curvature import gauss_newton_product
from ecif.heads.influence import pair_losses, score
from ecif.losses import CLIP, Dcl, SigLip
from ecif.sample import Sample
from ecif.slices import MAX_SLICES, LinearSystem, Shared, Slices, sliced
from ecif.system import LocalSystem, gather_evidence, sample_bank
from tests.support.launches import Launches

G = torch.Generator().manual_seed(0)
CPU = torch.device("cpu")
PAIRS, FOLDS, REPEATS = 24, 3, 3


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=G), dim=1).half()


def random_heads() -> Heads:
    return Heads(torch.randn(8, 4, generator=G), torch.randn(6, 4, generator=G), 5.0)


SAMPLE = Sample(unit(PAIRS, 8), unit(PAIRS, 6), (torch.arange(PAIRS) % FOLDS).short(), [9, 8, 7])
CHECKPOINT = random_heads()
BANK = build_bank(SAMPLE.images.float(), SAMPLE.texts.float(), SAMPLE.fold, CHECKPOINT)
# Two checkpoints of every fit and two seeds: [checkpoints], [folds][seeds x checkpoints].
FITTED = FittedHeads([random_heads() for _ in range(2)], [[random_heads() for _ in range(4)] for _ in range(FOLDS)])
SHARED = Shared(SAMPLE, FITTED.every(), CHECKPOINT, CLIP, BANK)


def batches_of_all_repeats() -> list[Tensor]:
    return [rows for repeat in range(REPEATS) for rows in SAMPLE.batches(repeat)]


def with_captions_of_partners(fold: int | None = None) -> Sample:
    """The sample, with planted captions: those of one fold, by default of all."""
    swapped = SAMPLE.texts[SAMPLE.partners()]
    mine = torch.ones(PAIRS, 1, dtype=torch.bool) if fold is None else (SAMPLE.fold == fold)[:, None]
    return SAMPLE._replace(texts=torch.where(mine, swapped, SAMPLE.texts))


def embedded(heads: Heads, sample: Sample = SAMPLE) -> Embedded:
    return embed(heads, sample.images.float(), sample.texts.float())


def mean_pair_loss(heads: Heads, sample: Sample) -> Tensor:
    """[N] Pos_n, mean over the batches of all repeats."""
    pairs, total = embedded(heads, sample), torch.zeros(PAIRS)
    for rows in batches_of_all_repeats():
        total[rows] += CLIP.pair_loss(logits(heads, pairs.take(rows))) / REPEATS
    return total


def test_everybody_has_another_one_of_the_same_fold():
    partner = SAMPLE.partners()
    assert sorted(partner.tolist()) == list(range(PAIRS))
    assert (partner != torch.arange(PAIRS)).all()
    assert torch.equal(SAMPLE.fold[partner], SAMPLE.fold)
    assert torch.equal(partner, SAMPLE.partners())


def grouped(group: Tensor) -> Sample:
    """The sample with these groups of copies, all in one fold."""
    return SAMPLE._replace(fold=torch.zeros(PAIRS, dtype=torch.int16), group=group)


def test_a_planted_swap_gives_no_pair_the_caption_of_a_copy():
    group = torch.arange(PAIRS)
    group[[3, 9, 17]], group[[5, 6]] = 3, 5
    partner = grouped(group).partners()
    assert sorted(partner.tolist()) == list(range(PAIRS))
    assert (group[partner] != group).all()


def test_where_every_pair_is_there_twice_both_copies_get_the_captions_of_one_group():
    group = torch.arange(PAIRS) // 2 * 2
    partner = grouped(group).partners()
    assert (group[partner] != group).all()
    assert torch.equal(group[partner][::2], group[partner][1::2])


def test_a_swap_with_a_copy_or_with_a_caption_that_says_the_same_is_not_counted_as_one():
    group = torch.arange(PAIRS)
    group[:20] = 0  # more than half of the fold: some of them get captions of each other
    sample = grouped(group)
    partner = sample.partners()
    free = int((group[partner] != group).nonzero()[0])
    texts = SAMPLE.texts.clone()
    texts[partner[free]] = texts[free] + 0.001  # nearly the caption that it replaces
    sample = sample._replace(texts=texts)
    said = normalize(texts.double() - texts.double().mean(0), dim=1)
    fitted = FittedHeads([SHARED.heads[0]], [[SHARED.heads[0]]])
    evidence = gather_evidence(
        LocalSystem(fitted, SHARED._replace(sample=sample, heads=fitted.every()), 1), [ClipScore()], BANK
    )
    truth = [bool(group[p] != group[n]) and float(said[n] @ said[p]) <= 0.9 for n, p in enumerate(partner.tolist())]
    assert evidence.swapped.tolist() == truth
    assert not evidence.swapped[free]
    assert 0 < evidence.swapped.sum() < PAIRS - 1


def test_a_pair_that_is_alone_in_its_fold_keeps_its_caption():
    alone = SAMPLE._replace(fold=torch.arange(PAIRS).short())
    assert torch.equal(alone.partners(), torch.arange(PAIRS))


def test_repeats_deal_every_pair_once_to_batches_of_the_same_sizes():
    first, again = SAMPLE.batches(0), SAMPLE.batches(1)
    assert [len(b) for b in again] == [len(b) for b in first] == SAMPLE.sizes
    assert sorted(torch.cat(again).tolist()) == list(range(PAIRS))
    assert not torch.equal(torch.cat(again), torch.cat(first))
    assert all(map(torch.equal, again, SAMPLE.batches(1)))


@pytest.mark.parametrize("count", [0, 1, MAX_SLICES - 1, MAX_SLICES, 3 * MAX_SLICES + 5])
def test_slices_are_few_of_about_the_same_size_and_in_order(count):
    slices = sliced(list(range(count)))
    assert [item for one in slices for item in one] == list(range(count))
    assert len(slices) == min(count, MAX_SLICES)
    assert not slices or max(map(len, slices)) - min(map(len, slices)) <= 1


@pytest.mark.parametrize("plant", [False, True])
@pytest.mark.parametrize("fold", [0, 2])
def test_held_out_scores_are_means_over_repeats_in_a_copy_whose_fold_has_swapped_captions(fold, plant):
    places = SAMPLE.places(REPEATS)
    slices = Slices(SHARED, [places[:2], places[2:]], CPU)
    directions = torch.randn(2, CHECKPOINT.size, generator=G)
    influence, scores = torch.zeros(PAIRS, 2), torch.zeros(PAIRS, 2)
    for at in range(2):
        rows, values = slices.held_out_influence(at, 1, directions, fold, plant)
        influence.index_add_(0, rows, values / REPEATS)
        rows, values = slices.held_out_scores(at, [HeldOutLoss(), HeldOutCosine()], [1], fold, plant)
        scores.index_add_(0, rows, values / REPEATS)

    heads, mine = SHARED.heads[1], SAMPLE.fold == fold
    copy = with_captions_of_partners(fold) if plant else SAMPLE
    truth = score(heads, embedded(heads, copy), batches_of_all_repeats(), directions)
    assert torch.allclose(influence[mine], (truth.positive + truth.negative).T[mine], atol=1e-4)
    pairs = embedded(heads, copy)
    losses, cosines = pair_losses(heads, pairs, batches_of_all_repeats()), (pairs.u * pairs.v).sum(1)
    assert torch.allclose(scores[mine], torch.stack([losses, cosines], 1)[mine], atol=1e-4)
    assert not influence[~mine].any()
    assert not scores[~mine].any()


@pytest.mark.parametrize("plant", [False, True])
def test_agreement_is_that_of_a_copy_in_which_everybody_has_the_caption_of_a_partner(plant):
    places = SAMPLE.places(1)
    slices = Slices(SHARED, [places[:2], places[2:]], CPU)
    ours = torch.cat([slices.scores(at, [Agreement()], plant) for at in range(2)])[:, 0]
    copy = with_captions_of_partners() if plant else SAMPLE
    assert torch.allclose(ours, agreement_with(BANK, copy.images.float(), copy.texts.float(), copy.fold), atol=1e-5)


def test_products_of_all_slices_are_the_curvature_of_the_sample_without_each_systems_fold():
    system = LocalSystem(FITTED, SHARED, REPEATS)
    systems = [LinearSystem(1, -1), LinearSystem(3, 0), LinearSystem(3, 0), LinearSystem(3, 2)]
    vectors = torch.randn(len(systems), CHECKPOINT.size, generator=G)
    found = system.product(systems, vectors)
    for i, (heads, without_fold) in enumerate(systems):
        own = SHARED.heads[heads]
        kept = [rows[SAMPLE.fold[rows] != without_fold] for rows in SAMPLE.batches()]
        truth = gauss_newton_product(own, embedded(own), kept, vectors[i : i + 1])
        assert torch.allclose(found[i], truth[0], rtol=1e-4, atol=1e-4 * truth.abs().max().item())


@pytest.mark.parametrize("loss", [CLIP, Dcl(), SigLip()], ids=lambda loss: type(loss).__name__)
def test_systems_that_are_computed_together_have_the_same_products(monkeypatch, loss):
    systems = [LinearSystem(2 + fits, fits // 4) for fits in range(4 * FOLDS)] + [LinearSystem(1, -1)] * 2
    vectors = torch.randn(len(systems), CHECKPOINT.size, generator=G)
    shared = SHARED._replace(loss=loss, heads=[heads._replace(logit_scale=4.0 + i) for i, heads in enumerate(SHARED.heads)])
    found, counts = [], []
    for most in (1, 16):
        monkeypatch.setattr("ecif.slices.TOGETHER", {"cpu": most})
        system = LocalSystem(FITTED, shared, REPEATS)
        system.product(systems, vectors)
        with Launches() as launches:
            found.append(system.product(systems, vectors))
        counts.append(launches.count)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4 * found[0].abs().max().item())
    assert counts[1] < counts[0] / 4


def test_influence_is_that_of_all_pairs_in_the_batches_of_the_fit():
    directions = torch.randn(3, CHECKPOINT.size, generator=G)
    found = LocalSystem(FITTED, SHARED, REPEATS).influence(1, directions)
    truth = score(SHARED.heads[1], embedded(SHARED.heads[1]), SAMPLE.batches(), directions)
    assert torch.allclose(found, truth.positive + truth.negative, atol=1e-4)


@pytest.mark.parametrize("plant", [False, True])
def test_cross_fitted_influence_is_the_mean_over_the_fits_that_did_not_see_a_pairs_fold(plant):
    directions = torch.randn(FOLDS, 4, 2, CHECKPOINT.size, generator=G)
    found = LocalSystem(FITTED, SHARED, REPEATS).held_out_influence(directions, plant)
    truth = torch.zeros(2, PAIRS)
    for fold, fits in enumerate(FITTED.folds):
        mine = SAMPLE.fold == fold
        copy = with_captions_of_partners(fold) if plant else SAMPLE
        for fit, heads in enumerate(fits):
            scores = score(heads, embedded(heads, copy), batches_of_all_repeats(), directions[fold, fit])
            truth[:, mine] += (scores.positive + scores.negative)[:, mine] / 4
    assert torch.allclose(found, truth, atol=1e-4)


@pytest.mark.parametrize("plant", [False, True])
def test_cross_fitted_scores_are_means_over_the_last_heads_of_every_seed(plant):
    found = LocalSystem(FITTED, SHARED, REPEATS).scores([HeldOutLoss(), Agreement(), HeldOutCosine()], plant)
    loss, cosine = torch.zeros(PAIRS), torch.zeros(PAIRS)
    for fold, fits in enumerate(FITTED.folds):
        mine = SAMPLE.fold == fold
        copy = with_captions_of_partners(fold) if plant else SAMPLE
        for heads in (fits[1], fits[3]):
            pairs = embedded(heads, copy)
            loss[mine] += mean_pair_loss(heads, copy)[mine] / 2
            cosine[mine] += (pairs.u * pairs.v).sum(1)[mine] / 2
    copy = with_captions_of_partners() if plant else SAMPLE
    agreement = agreement_with(BANK, copy.images.float(), copy.texts.float(), copy.fold)
    assert torch.allclose(found, torch.stack([loss, agreement, cosine]), atol=1e-4)


def test_a_swap_of_two_equal_captions_is_no_evidence_of_a_swap():
    sample = SAMPLE._replace(texts=SAMPLE.texts.clone())
    first = int((SAMPLE.fold == 0).nonzero()[0])
    partner = int(sample.partners()[first])
    sample.texts[partner] = sample.texts[first]
    shared = SHARED._replace(sample=sample)
    evidence = gather_evidence(LocalSystem(FITTED, shared, 1), [HeldOutCosine()], BANK)
    said = normalize(sample.texts.double() - sample.texts.double().mean(0), dim=1)
    assert not evidence.swapped[first]
    assert evidence.swapped.tolist() == [float(said[n] @ said[p]) <= 0.9 for n, p in enumerate(sample.partners().tolist())]
    assert evidence.real.shape == evidence.planted.shape == (1, PAIRS)
    assert torch.equal(
        (evidence.real != evidence.planted)[0].nonzero()[:, 0], torch.arange(PAIRS)[torch.arange(PAIRS) != first]
    )


def rows_of_bank(monkeypatch, size: int, seed: int) -> list[int]:
    """Which sampled pairs a bank of this size holds, by their images and by their captions."""
    monkeypatch.setattr("ecif.system.BANK", size)
    bank = sample_bank(SAMPLE, CHECKPOINT, seed)
    found = []
    for known, centre, every in (
        (bank.images, bank.image_centre, SAMPLE.images),
        (bank.texts, bank.text_centre, SAMPLE.texts),
    ):
        centred = torch.nn.functional.normalize(every.float() - centre, dim=1)
        found.append((known.float() @ centred.T).argmax(1).tolist())
    assert found[0] == found[1]
    assert bank.fold.tolist() == SAMPLE.fold[found[0]].tolist()
    return found[0]


def test_a_bank_of_some_pairs_has_their_images_captions_and_folds(monkeypatch):
    rows = rows_of_bank(monkeypatch, 10, seed=0)
    assert len(set(rows)) == 10
    assert rows_of_bank(monkeypatch, 10, seed=0) == rows
    assert rows_of_bank(monkeypatch, 10, seed=1) != rows


def test_a_small_sample_is_its_own_bank(monkeypatch):
    assert rows_of_bank(monkeypatch, 1000, seed=0) == list(range(PAIRS))
