"""Planted swaps: who gets whose caption, and that their scores are those of a corpus with these captions."""

import numpy as np
import pytest
import torch

from ecif.columns.agreement import agreement_with
from ecif.columns.bank import build
from ecif.heads import Heads, embed
from ecif.heads.influence import score
from ecif.losses import CLIP
from pipeline.config import Config
from pipeline.stages.fit.sample import Sample
from pipeline.stages.solve.slices import _Slices
from pipeline.stages.solve.stage import _bank

RNG = np.random.default_rng(0)


def unit(*shape) -> np.ndarray:
    values = RNG.standard_normal(shape)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


SAMPLE = Sample(unit(24, 8), unit(24, 6), (np.arange(24) % 3).astype(np.int16), [9, 8, 7])
HEADS = Heads(torch.from_numpy(RNG.standard_normal((8, 4))).float(), torch.from_numpy(RNG.standard_normal((6, 4))).float(), 5.0)


def test_everybody_has_another_one_of_the_same_fold():
    partner = SAMPLE.partners()
    assert sorted(partner) == list(range(24))
    assert (partner != np.arange(24)).all()
    assert np.array_equal(SAMPLE.fold[partner], SAMPLE.fold)
    assert np.array_equal(partner, SAMPLE.partners())


def test_a_pair_that_is_alone_in_its_fold_keeps_its_caption():
    alone = SAMPLE._replace(fold=np.arange(24, dtype=np.int16))
    assert np.array_equal(alone.partners(), np.arange(24))


def test_repeats_deal_every_pair_once_to_batches_of_the_same_sizes():
    first, again = SAMPLE.batches(0), SAMPLE.batches(1)
    assert [len(b) for b in again] == [len(b) for b in first] == SAMPLE.sizes
    assert sorted(np.concatenate(again)) == list(range(24))
    assert not np.array_equal(np.concatenate(again), np.concatenate(first))
    assert all(map(np.array_equal, again, SAMPLE.batches(1)))


@pytest.mark.parametrize(
    ("batch", "told", "repeats"), [(16, None, 4), (256, None, 4), (1000, None, 1), (4096, None, 1), (4096, 3, 3)]
)
def test_large_batches_are_repeated_less_unless_told(batch, told, repeats):
    needed = {"run": "run", "corpus": {"shards": "a"}, "model": {"name": "m"}, "targets": {"t": {"shards": "b"}}}
    assert Config.model_validate(needed | {"batch_size": batch, "score": {"repeats": told}}).repeats == repeats


@pytest.mark.parametrize("plant", [False, True])
@pytest.mark.parametrize("fold", [0, 2])
def test_out_of_sample_scores_are_means_over_repeats_in_a_copy_whose_fold_has_swapped_captions(fold, plant):
    repeats = [SAMPLE.batches(repeat) for repeat in range(3)]
    places = list(zip(*repeats, strict=True))
    actor = _Slices((SAMPLE, [HEADS], CLIP), [places[:2], places[2:]])
    directions = RNG.standard_normal((2, HEADS.size)).astype(np.float32)
    ours = np.zeros((24, 4), np.float32)
    for at in range(2):
        rows, scores = actor.out_of_sample(at, 0, directions, fold, plant)
        np.add.at(ours, rows, scores / 3)

    texts, mine = SAMPLE.texts.copy(), SAMPLE.fold == fold
    if plant:
        texts[mine] = SAMPLE.texts[SAMPLE.partners()[mine]]
    pairs = embed(HEADS, torch.from_numpy(SAMPLE.images.astype(np.float32)), torch.from_numpy(texts.astype(np.float32)))
    batches = [torch.from_numpy(rows) for batches in repeats for rows in batches]
    theirs = score(HEADS, pairs, batches, torch.from_numpy(directions))
    expected = torch.cat([theirs.pair_loss[None], theirs.clip_score[None], theirs.positive + theirs.negative]).T.numpy()
    assert np.allclose(ours[mine], expected[mine], atol=1e-4)
    assert not ours[~mine].any()


@pytest.mark.parametrize("plant", [False, True])
def test_agreement_is_that_of_a_copy_in_which_everybody_has_the_caption_of_a_partner(plant):
    images, texts, fold = (torch.from_numpy(part.copy()) for part in SAMPLE[:3])
    bank = build(images.float(), texts.float(), fold, HEADS)
    actor = _Slices((SAMPLE, [HEADS], CLIP), [[(rows,) for rows in SAMPLE.batches()[:2]], [(SAMPLE.batches()[2],)]])
    ours = torch.cat([actor.agreement(at, bank, plant) for at in range(2)])
    captions = texts[torch.from_numpy(SAMPLE.partners())] if plant else texts
    assert torch.allclose(ours, agreement_with(bank, images.float(), captions.float(), fold), atol=1e-5)


def test_a_bank_of_some_pairs_has_their_images_captions_and_folds(monkeypatch):
    monkeypatch.setattr("pipeline.stages.solve.stage.BANK", 10)
    needed = {"run": "run", "corpus": {"shards": "a"}, "model": {"name": "m"}, "targets": {"t": {"shards": "b"}}}
    bank = _bank(SAMPLE, HEADS, Config.model_validate(needed))
    found = []
    for known, centre, features in ((bank.images, bank.image_centre, SAMPLE[0]), (bank.texts, bank.text_centre, SAMPLE[1])):
        every = torch.nn.functional.normalize(torch.from_numpy(features.astype(np.float32)) - centre, dim=1)
        found.append((known.float() @ every.T).argmax(1).tolist())
    assert found[0] == found[1]
    assert len(set(found[0])) == 10
    assert bank.fold.tolist() == SAMPLE.fold[found[0]].tolist()
