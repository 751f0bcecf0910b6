"""Each kind of target against its own definition, written out, and its gradient against finite differences."""

import math
from dataclasses import replace

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from ecif.heads import embed
from ecif.heads.curvature import loss_gradient
from ecif.heads.fit import fixed_batches
from ecif.targets import Contrastive, RetrievalMargin, ZeroShot, coverage
from ecif.temperature import TEMPERATURES, best_temperature
from ecif.towers import load
from tests.support.problems import D_TEXT, fit_one, flat, random_features, random_heads, slow_logits, slow_loss
from tests.support.small_models import TINY, write_model

G = torch.Generator().manual_seed(4)
IMAGES, TEXTS = random_features(11)
BATCHES = list(torch.randperm(11, generator=G).split([6, 5]))
# Heads that are mostly right: random ones are no better than chance, and their best temperature is none at all.
FIT = {"batch_size": 11, "epochs": 6, "learning_rate": 0.1, "seed": 0}
HEADS = fit_one(random_heads(), IMAGES, TEXTS, fixed_batches([torch.arange(11)]), **FIT)[-1]
CLASSES, TEMPLATES = 4, 3
PROMPTS = torch.randn(CLASSES, TEMPLATES, D_TEXT, generator=G, dtype=torch.float64)
(SEEN,) = ZeroShot(IMAGES, torch.zeros(11), PROMPTS).similarities(HEADS, [torch.arange(11)])
LABELS = SEEN.argmax(0)
LABELS[:3] = (LABELS[:3] + 1) % CLASSES
TARGETS = {
    "contrastive": Contrastive(IMAGES, TEXTS),
    "contrastive, calibrated": Contrastive(IMAGES, TEXTS, calibrated=True),
    "zero-shot": ZeroShot(IMAGES, LABELS, PROMPTS),
    "zero-shot, calibrated": ZeroShot(IMAGES, LABELS, PROMPTS, calibrated=True),
    "retrieval margin": RetrievalMargin(IMAGES, TEXTS, 0.2),
}


def moved(weights):
    image, text = HEADS.split(weights)
    return HEADS._replace(image=image, text=text)


@pytest.mark.parametrize("name", TARGETS)
def test_gradient_against_finite_differences(name):
    """For a calibrated one these go through the temperature that each step finds anew: the envelope theorem."""
    target, weights, step = TARGETS[name], flat(HEADS), 1e-6
    gradient = target.gradient(HEADS, BATCHES)
    for direction in torch.randn(4, len(weights), generator=G, dtype=torch.float64):
        ahead, behind = (target.value(moved(weights + sign * step * direction), BATCHES) for sign in (1, -1))
        assert gradient @ direction == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_single_precision_agrees_with_double(name):
    target = TARGETS[name]
    doubles = {k: v for k, v in vars(target).items() if torch.is_tensor(v) and v.is_floating_point()}
    single = replace(target, **{k: v.float() for k, v in doubles.items()})
    heads = HEADS._replace(image=HEADS.image.float(), text=HEADS.text.float())
    truth = target.gradient(HEADS, BATCHES)
    assert (single.gradient(heads, BATCHES).double() - truth).norm() < 1e-5 * truth.norm()


def test_contrastive_is_the_loss_that_heads_are_trained_on():
    target = Contrastive(IMAGES, TEXTS)
    truth = sum(slow_loss(slow_logits(HEADS, flat(HEADS), IMAGES[rows], TEXTS[rows])) for rows in BATCHES)
    assert torch.allclose(target.value(HEADS, BATCHES), truth)
    embedded = [embed(HEADS, IMAGES[rows], TEXTS[rows]) for rows in BATCHES]
    assert torch.allclose(target.gradient(HEADS, BATCHES), loss_gradient(HEADS, embedded))


def test_zero_shot_against_a_loop():
    image, text = HEADS.image, HEADS.text
    total = 0.0
    for x, label in zip(IMAGES, LABELS, strict=True):
        v = (x @ image) / (x @ image).norm()
        scores = []
        for templates in PROMPTS:
            mean = sum((t @ text) / (t @ text).norm() for t in templates) / TEMPLATES
            scores.append(math.exp(HEADS.logit_scale * (v @ mean / mean.norm())))
        total -= math.log(scores[label] / sum(scores))
    assert TARGETS["zero-shot"].value(HEADS, BATCHES).item() == pytest.approx(total)


def test_zero_shot_does_not_depend_on_the_batches():
    assert torch.allclose(
        TARGETS["zero-shot"].gradient(HEADS, BATCHES), TARGETS["zero-shot"].gradient(HEADS, list(torch.arange(11)[:, None]))
    )


def test_zero_shot_logits_are_those_of_open_clips_classifier(tmp_path):
    """On a whole model: open_clip's own code with uncut towers, ours with trunk features and heads."""
    name = write_model(tmp_path / "model", TINY)
    names, templates = ["cat", "dog", "a {red} car"], ["a photo of a {c}.", "{c}", "one {c}, two"]
    towers = load(name)
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fill = [lambda c, t=t: t.replace("{c}", c) for t in templates]
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, fill)
    with torch.no_grad():
        images = model.encode_image((pixels.float() / 255 - 0.5) / 0.5, normalize=True)
        truth = model.logit_scale.exp() * images @ classifier
    prompts = towers.text_features([f(c) for c in names for f in fill]).view(3, 3, -1)
    target = ZeroShot(towers.image_features(pixels), torch.zeros(5, dtype=torch.int64), prompts)
    (ours,) = target.similarities(towers.heads, [torch.arange(5)])
    assert torch.allclose(ours.T, truth, atol=1e-4)


def test_retrieval_margin_against_a_loop():
    total = 0.0
    for rows in BATCHES:
        cosine = slow_logits(HEADS._replace(logit_scale=1.0), flat(HEADS), IMAGES[rows], TEXTS[rows])
        for i in range(len(rows)):
            for j in range(len(rows)):
                if i != j:
                    total += max(0.0, (0.2 + cosine[i, j] - cosine[i, i]).item())
                    total += max(0.0, (0.2 + cosine[j, i] - cosine[i, i]).item())
    assert TARGETS["retrieval margin"].value(HEADS, BATCHES).item() == pytest.approx(total)


@pytest.mark.parametrize("name", ["contrastive, calibrated", "zero-shot, calibrated", "retrieval margin"])
def test_a_change_of_confidence_changes_nothing(name):
    """The same rankings at another logit scale have the same loss and the same gradient."""
    target, warmer = TARGETS[name], HEADS._replace(logit_scale=2.5 * HEADS.logit_scale)
    assert torch.allclose(target.value(warmer, BATCHES), target.value(HEADS, BATCHES))
    assert torch.allclose(target.gradient(warmer, BATCHES), target.gradient(HEADS, BATCHES), rtol=1e-4, atol=1e-8)
    plain = Contrastive(IMAGES, TEXTS)
    assert not torch.allclose(plain.value(warmer, BATCHES), plain.value(HEADS, BATCHES), rtol=0.05)


def test_the_best_temperature_is_the_best_of_a_fine_grid():
    similarities = TARGETS["contrastive"].similarities(HEADS, BATCHES)
    loss = lambda tau: sum(slow_loss(tau * s) for s in similarities)  # noqa: E731
    tau, grid = best_temperature(loss), torch.linspace(0.05, 8, 2000, dtype=torch.float64)
    best = min(grid.tolist(), key=loss)
    assert tau == pytest.approx(best, abs=0.005)
    assert loss(tau) <= loss(best)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_temperature_of_separable_pairs_is_a_bound(sign):
    """Every pair right: ever more confidence is better. Every pair wrong: ever less."""
    similarity = sign * (torch.eye(4, dtype=torch.float64) + 0.1 * torch.randn(4, 4, generator=G, dtype=torch.float64))
    assert best_temperature(lambda tau: slow_loss(tau * similarity)) == pytest.approx(TEMPERATURES**sign)


def unit(*shape):
    return normalize(torch.randn(*shape, generator=G, dtype=torch.float64), dim=-1)


def test_coverage_against_a_loop():
    corpus, target = unit(20, 6), unit(7, 6)
    covered = 0
    for i, caption in enumerate(corpus):
        others = sorted((caption @ other for j, other in enumerate(corpus) if j != i), reverse=True)
        covered += any(caption @ pair >= others[2] for pair in target)
    assert coverage(corpus, target, neighbours=3) == pytest.approx(covered / 20)


@pytest.mark.parametrize("pairs", [50, 100, 400])
def test_coverage_of_a_target_that_is_drawn_like_the_corpus(pairs):
    """Only its size counts, by the formula of the docstring."""
    measured = sum(coverage(unit(400, 8), unit(pairs, 8)) for _ in range(4)) / 4
    assert measured == pytest.approx(1 - (400 / (400 + pairs)) ** 5, abs=0.03)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 1.0])
def test_coverage_is_the_share_of_the_concepts_however_large_the_target(share):
    concepts = unit(16, 32)
    draw = lambda each, among: normalize(among.repeat(each, 1) + 0.05 * unit(each * len(among), 32), dim=1)  # noqa: E731
    asked = concepts[: round(16 * share)]
    assert coverage(draw(25, concepts), draw(200, asked)) == pytest.approx(share, abs=0.02)


def test_a_corpus_of_one_caption_is_covered():
    assert coverage(unit(1, 6), unit(3, 6)) == 1.0
