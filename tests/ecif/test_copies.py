"""Copies are found whatever the order and the chunks, share a fold, and are counted: held against plain arithmetic."""

import pytest
import torch

from ecif import copies
from ecif.batching import folds
from ecif.copies import NEAR, STEPS, Copies, directions, find_copies, fold_of_groups, group_copies, pair_ids

FOLDS, SEED = 3, 5


def features(count: int, width: int, seed: int) -> torch.Tensor:
    """[N, width] unit rows in half precision with a common part, as models give them."""
    g = torch.Generator().manual_seed(seed)
    found = torch.randn(count, width, generator=g) + 1.5
    return (found / found.norm(dim=1, keepdim=True)).half()


def moved(rows: torch.Tensor, by: float, seed: int = 9) -> torch.Tensor:
    """Near-copies of unit rows."""
    found = rows.float() + by * torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)) / rows.shape[1] ** 0.5
    return (found / found.norm(dim=1, keepdim=True)).half()


# 60 images; 0 to 9 have a near-copy each, and 0 to 4 another one. All captions differ but for those of the first near-copies.
IMAGES = torch.cat([own := features(60, 24, 0), moved(own[:10], 0.1), moved(own[:5], 0.1, 8)])
TEXTS = torch.cat([said := features(60, 16, 1), said[:10], features(5, 16, 2)])
UIDS = [f"{(37 * i) % 75:032x}" for i in range(75)]
PAIR = pair_ids("a", torch.arange(75))


def found(rows: torch.Tensor | None = None) -> Copies:
    rows = torch.arange(75) if rows is None else rows
    return find_copies(IMAGES[rows], TEXTS[rows], [UIDS[n] for n in rows.tolist()], PAIR[rows], FOLDS, SEED)


def exact_cosine(features: torch.Tensor) -> torch.Tensor:
    """Cosines of centred features in float64, without rounding."""
    centred = features.double() - features.double().mean(0)
    centred = centred / centred.norm(dim=1, keepdim=True)
    return centred @ centred.T


def test_near_copies_are_one_group_and_in_one_fold_and_others_are_not():
    group = found().group
    assert group.tolist() == [*range(60), *range(10), *range(5)]
    assert torch.equal(group[:, None] == group[None], exact_cosine(IMAGES) > NEAR)
    assert torch.equal(found().fold, found().fold[group])


def test_a_group_has_the_fold_of_its_least_uid_and_a_pair_without_copies_that_of_its_own():
    group, fold = found().group.tolist(), found().fold
    for n in range(75):
        least = min(UIDS[m] for m in range(75) if group[m] == group[n])
        assert fold[n] == folds([least], FOLDS, SEED)[0]


def test_the_order_of_the_rows_does_not_matter():
    order = torch.randperm(75, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found(order).fold, found().fold[order])


def test_no_result_depends_on_the_chunks(monkeypatch):
    whole = found()
    counted = whole.of(IMAGES, TEXTS, UIDS, PAIR)
    monkeypatch.setattr(copies, "CHUNK", 7)
    monkeypatch.setattr(copies, "KNOWN", 11)
    again = found()
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(whole, again, strict=True))
    for a, b in zip(counted, again.of(IMAGES, TEXTS, UIDS, PAIR), strict=True):
        assert torch.equal(a, b)


def test_cosines_are_exact_in_float32_in_any_order_of_summation():
    units = directions(features(50, 700, 3), features(50, 700, 3).double().mean(0))
    exact = (units.double() * STEPS).long()
    truth = (exact @ exact.T).double() / STEPS**2
    order = torch.randperm(701, generator=torch.Generator().manual_seed(0))
    for columns in (torch.arange(701), order):
        assert torch.equal((units[:, columns].float() @ units[:, columns].float().T).double(), truth)
    cosine = exact_cosine(features(50, 700, 3))
    assert (truth - cosine).abs().max() < 1e-3


def test_a_pair_outside_of_the_sample_takes_the_fold_of_its_nearest_sampled_near_copy_or_its_own_hash():
    sampled, outside = torch.arange(60), torch.arange(60, 75)
    known = found(sampled)
    others = torch.cat([IMAGES[outside], features(20, 24, 7)])
    uids = [*(UIDS[n] for n in outside.tolist()), *(f"{900 + i:032x}" for i in range(20))]
    fold = known.of(others, features(35, 16, 8), uids, pair_ids("b", torch.arange(35))).fold
    assert fold[:10].tolist() == known.fold[:10].tolist()
    assert fold[10:15].tolist() == known.fold[:5].tolist()
    assert torch.equal(fold[15:], folds(uids[15:], FOLDS, SEED))


def test_a_sampled_pair_has_the_fold_of_the_sample():
    rows = torch.tensor([70, 3, 64, 20])
    fold = found().of(IMAGES[rows], TEXTS[rows], [UIDS[n] for n in rows.tolist()], PAIR[rows]).fold
    assert torch.equal(fold, found().fold[rows])


def test_copies_in_the_sample_are_counted_without_the_pair_itself():
    counted = found().of(IMAGES, TEXTS, UIDS, PAIR)
    for values, side in ((counted.image_copies, IMAGES), (counted.caption_copies, TEXTS)):
        assert values.tolist() == ((exact_cosine(side) > NEAR).sum(1) - 1).tolist()
    assert counted.image_copies.tolist() == [2] * 5 + [1] * 5 + [0] * 50 + [2] * 5 + [1] * 5 + [2] * 5
    assert counted.caption_copies.tolist() == [1] * 10 + [0] * 50 + [1] * 10 + [0] * 5
    # The same pairs in another shard are not the sampled ones: those count as their copies.
    elsewhere = found().of(IMAGES, TEXTS, UIDS, pair_ids("b", torch.arange(75)))
    assert torch.equal(elsewhere.image_copies, counted.image_copies + 1)


def test_placeholder_images_and_boilerplate_captions_show():
    images, texts = features(100, 24, 11), features(100, 16, 12)
    images[10:40], texts[50:90] = images[10].clone(), texts[50].clone()
    uids, pair = [f"{i:032x}" for i in range(100)], pair_ids("a", torch.arange(100))
    counted = find_copies(images, texts, uids, pair, FOLDS, SEED).of(images, texts, uids, pair)
    assert counted.image_copies.tolist() == [0] * 10 + [29] * 30 + [0] * 60
    assert counted.caption_copies.tolist() == [0] * 50 + [39] * 40 + [0] * 10


def test_a_chain_through_much_of_the_corpus_is_cut_but_exact_copies_stay_together():
    angles = torch.linspace(0, 5, 100).double()
    chain = directions(torch.stack([angles.cos(), angles.sin()], 1), torch.zeros(2).double())
    apart = directions(torch.eye(40).double(), torch.zeros(40).double())
    units = torch.zeros(2 * 140, 43).half()
    units[:200, :2] = chain[:, :2].repeat_interleave(2, 0)  # every image of the chain is there twice
    units[200:, 2:42] = apart[:, :40].repeat_interleave(2, 0)
    most = len(units) / (2 * FOLDS)
    group = group_copies(units, FOLDS)
    assert torch.bincount(group).max() <= most < 200
    assert torch.equal(group[::2], group[1::2])
    assert torch.equal(group[200::2], torch.arange(200, 280, 2))  # what was no chain is left alone


def test_a_group_of_exact_copies_is_never_cut():
    images = features(60, 24, 0)
    images[:50] = images[0].clone()
    group = group_copies(directions(images, images.double().mean(0)), FOLDS)
    assert group.tolist() == [0] * 50 + list(range(50, 60))


@pytest.mark.parametrize("noise", [0.0, 2.0**-13])
def test_where_every_image_is_the_same_they_are_copies(noise):
    """Centred, such features are zero, or rounding errors without a direction."""
    images = features(1, 24, 0).repeat(40, 1) + noise * torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).half()
    uids, pair = [f"{i:032x}" for i in range(40)], pair_ids("a", torch.arange(40))
    known = find_copies(images, features(40, 16, 1), uids, pair, FOLDS, SEED)
    assert known.group.tolist() == [0] * 40
    with pytest.raises(
        ValueError, match="the images of the 40 sampled pairs are copies of 1: 3 folds need at least 3 different"
    ):
        known.check()


def test_folds_that_leave_nobody_to_fit_on_are_refused():
    known = found()._replace(fold=torch.zeros(75, dtype=torch.int16))
    with pytest.raises(ValueError, match="75 of 75 sampled pairs are in one fold"):
        known.check()
    found().check()


def test_identities_of_pairs_differ():
    several = torch.cat([pair_ids(shard, torch.arange(1000)) for shard in ("a", "b", "a/b", "\udcff")])
    assert len(several.unique()) == 4000


def test_folds_of_groups_with_one_uid_for_several_pairs():
    group, uids = torch.tensor([0, 1, 0, 3]), ["b", "b", "a", "c"]
    assert fold_of_groups(group, uids, 7, 0).tolist() == folds(["a", "b", "a", "c"], 7, 0).tolist()
