import pytest
import torch
from torch.func import grad

from ecif.evaluation import spearman
from ecif.heads import embed, logits, logits_jvp, tangents
from ecif.heads.influence import pair_losses, score
from ecif.losses import Clip, Dcl, Loss, SigLip, SoftInfoNCE
from ecif.losses.contrastive import batch_loss
from tests.support.launches import Launches
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
    assert pair_losses(HEADS, PAIRS, BATCHES[:1])[absent].isnan().all()
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


class Plain(Loss, name="plain"):
    """CLIP's loss as a user would write it: for one batch, without closed forms."""

    def batch_loss(self, similarity):
        return batch_loss(similarity)

    def pair_loss(self, similarity):
        return similarity.logsumexp(1) + similarity.logsumexp(0) - 2 * similarity.diagonal()


LOSSES = [Clip(), Clip("taylor"), SigLip(), Dcl(), SoftInfoNCE(), Plain()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 5, 2], [1, 3, 3, 5], [2, 2, 2, 2, 2, 2], [12]], ids=str)
def test_a_stack_of_batches_is_scored_as_each_batch_alone(loss, sizes, monkeypatch):
    repeats = [torch.randperm(12, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    batches = [rows for order in repeats for rows in order.split(sizes)]
    truth, losses = torch.zeros(2, 2, 12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for rows in batches:
        batch = PAIRS.take(rows)
        losses[rows] += loss.pair_loss(logits(HEADS, batch)) / 3
        for t, direction in enumerate(DIRECTIONS):
            tangent = logits_jvp(HEADS, batch, *tangents(HEADS, batch, direction))
            truth[:, t, rows] += torch.stack(loss.pair_derivatives(logits(HEADS, batch), tangent)) / 3
    for entries in (1, 100, 2**16):
        monkeypatch.setattr("ecif.heads.influence.ENTRIES", {"cpu": entries})
        assert torch.allclose(torch.stack(score(HEADS, PAIRS, batches, DIRECTIONS, loss)), truth)
        assert torch.allclose(pair_losses(HEADS, PAIRS, batches, loss), losses)


def test_the_number_of_operations_does_not_grow_with_the_batches(monkeypatch):
    monkeypatch.setattr("ecif.heads.influence.ENTRIES", {"cpu": 2**25})
    counts = []
    for batches in (2, 64):
        images, texts = random_features(4 * batches)
        pairs, rows = embed(HEADS, images, texts), list(torch.arange(4 * batches).split(4))
        with Launches() as launches:
            score(HEADS, pairs, rows, DIRECTIONS)
        counts.append(launches.count)
    assert counts[0] == counts[1] < 250
