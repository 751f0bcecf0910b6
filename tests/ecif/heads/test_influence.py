import pytest
import torch
from torch.func import grad

from ecif.evaluation import spearman
from ecif.heads import embed
from ecif.heads.influence import score
from ecif.losses import Clip
from ecif.losses.contrastive import batch_loss
from tests.support.problems import flat, random_features, random_heads, slow_logits, without

HEADS = random_heads()
IMAGES, TEXTS = random_features(12)
PAIRS = embed(HEADS, IMAGES, TEXTS)
DIRECTIONS = torch.randn(2, HEADS.size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
BATCHES = list(torch.randperm(12, generator=torch.Generator().manual_seed(1)).split(4))


def positive(s, n):
    return s[n].logsumexp(0) + s[:, n].logsumexp(0) - 2 * s[n, n]


def negative(s, n, kind):
    if kind == "exact":
        return batch_loss(s) - batch_loss(without(s, n)) - positive(s, n)
    others = torch.arange(len(s)) != n
    return s.softmax(1)[others, n].sum() + s.softmax(0)[n, others].sum()


@pytest.mark.parametrize("kind", ["exact", "taylor"])
def test_projection_is_every_pairs_gradient_dotted_with_the_direction(kind):
    scores = score(HEADS, PAIRS, BATCHES, DIRECTIONS, Clip(kind))
    for rows in BATCHES:
        for at, pair in enumerate(rows.tolist()):

            def slow(w, rows=rows):
                return slow_logits(HEADS, w, IMAGES[rows], TEXTS[rows])

            g_pos = grad(lambda w, at=at, f=slow: positive(f(w), at))(flat(HEADS))
            g_neg = grad(lambda w, at=at, f=slow: negative(f(w), at, kind))(flat(HEADS))
            assert torch.allclose(scores.positive[:, pair], DIRECTIONS @ g_pos)
            assert torch.allclose(scores.negative[:, pair], DIRECTIONS @ g_neg)


def test_positive_parts_sum_to_the_gradient_of_the_loss():
    scores = score(HEADS, PAIRS, [torch.arange(12)], DIRECTIONS)
    total = grad(lambda w: batch_loss(slow_logits(HEADS, w, IMAGES, TEXTS)))(flat(HEADS))
    assert torch.allclose(scores.positive.sum(1), DIRECTIONS @ total)


def test_batched_equals_looped_and_repeats_are_averaged():
    whole = score(HEADS, PAIRS, BATCHES, DIRECTIONS)
    for rows in BATCHES:
        alone = score(HEADS, PAIRS.take(rows), [torch.arange(len(rows))], DIRECTIONS)
        assert torch.allclose(alone.positive, whole.positive[:, rows])
        assert torch.allclose(alone.negative, whole.negative[:, rows])
    other = list(torch.randperm(12, generator=torch.Generator().manual_seed(2)).split(6))
    both = score(HEADS, PAIRS, BATCHES + other, DIRECTIONS)
    mean = (whole.negative + score(HEADS, PAIRS, other, DIRECTIONS).negative) / 2
    assert torch.allclose(both.negative, mean)


def test_a_pair_in_no_batch_has_no_score():
    scores = score(HEADS, PAIRS, BATCHES[:1], DIRECTIONS)
    absent = torch.ones(12, dtype=torch.bool)
    absent[BATCHES[0]] = False
    assert scores.positive[:, absent].isnan().all()
    assert scores.pair_loss[absent].isnan().all()
    assert scores.positive[:, ~absent].isfinite().all()


def test_single_and_half_precision_features_stay_close():
    truth = score(HEADS, PAIRS, BATCHES, DIRECTIONS)
    heads = HEADS._replace(image=HEADS.image.float(), text=HEADS.text.float())
    single = score(heads, embed(heads, IMAGES.float(), TEXTS.float()), BATCHES, DIRECTIONS.float())
    assert torch.allclose(single.negative.double(), truth.negative, rtol=1e-3, atol=1e-4)
    half = score(heads, embed(heads, IMAGES.half().float(), TEXTS.half().float()), BATCHES, DIRECTIONS.float())
    assert torch.corrcoef(torch.stack([half.positive[0].double(), truth.positive[0]]))[0, 1] > 0.999


def test_features_in_bfloat16_keep_the_ranking():
    images, texts = random_features(96)
    directions = DIRECTIONS[:1]
    whole = [torch.arange(96)]
    truth = score(HEADS, embed(HEADS, images, texts), whole, directions)
    short = score(HEADS, embed(HEADS, images.bfloat16().double(), texts.bfloat16().double()), whole, directions)
    for ours, theirs in ((short.positive, truth.positive), (short.negative, truth.negative)):
        assert spearman(ours[0], theirs[0]) > 0.999
