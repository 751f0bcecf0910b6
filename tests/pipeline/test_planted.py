"""Planted swaps: who gets whose caption, and that their scores are those of a corpus with these captions."""

import numpy as np
import pytest
import torch

from ecif.heads import Heads, embed
from ecif.influence import score
from ecif.losses import CLIP
from pipeline.sample import Sample
from pipeline.slices import _Slices

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


@pytest.mark.parametrize("fold", [0, 2])
def test_scores_are_those_of_a_copy_in_which_the_fold_has_swapped_captions(fold):
    batches = SAMPLE.batches()
    actor = _Slices((SAMPLE, [HEADS], CLIP), [batches[:2], batches[2:]])
    directions = RNG.standard_normal((2, HEADS.size)).astype(np.float32)
    ours = [torch.cat(parts, -1) for parts in zip(*(actor.score(i, 0, directions, fold) for i in range(2)), strict=True)]

    texts = SAMPLE.texts.copy()
    mine = SAMPLE.fold == fold
    texts[mine] = SAMPLE.texts[SAMPLE.partners()[mine]]
    pairs = embed(HEADS, torch.from_numpy(SAMPLE.images.astype(np.float32)), torch.from_numpy(texts.astype(np.float32)))
    theirs = score(HEADS, pairs, [torch.from_numpy(rows) for rows in batches], torch.from_numpy(directions))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    plain = actor.score(0, 0, directions)
    assert not torch.allclose(plain[2], ours[2][: len(plain[2])])
