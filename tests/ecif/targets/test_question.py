"""A target asks one question wherever it is asked: of refits, of the direction, of the judge."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecif.heads import Heads
from ecif.targets import Contrastive, RetrievalMargin, TargetLoss, ZeroShot
from ecif.targets.question import CALIBRATION_GROUPS, COVERED_CAPTIONS, Question, coverage_of, deal

G = torch.Generator().manual_seed(0)
HEADS = Heads(torch.randn(8, 4, generator=G), torch.randn(6, 4, generator=G), 5.0)
PAIRS = 23


def unit(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=G), dim=-1)


IMAGES, TEXTS, LABELS, PROMPTS = unit(PAIRS, 8), unit(PAIRS, 6), torch.arange(PAIRS) % 3, unit(3, 2, 6)
LOSSES = {
    "contrastive": Contrastive(IMAGES, TEXTS),
    "contrastive, calibrated": Contrastive(IMAGES, TEXTS, calibrated=True),
    "retrieval margin": RetrievalMargin(IMAGES, TEXTS, 0.3),
    "zero-shot": ZeroShot(IMAGES, LABELS, PROMPTS),
    "zero-shot, calibrated": ZeroShot(IMAGES, LABELS, PROMPTS, calibrated=True),
}


def ask(loss: TargetLoss = LOSSES["contrastive"], batch: int = 5, seed: int = 0) -> Question:
    return deal("a", loss, batch, seed)


def of_size(pairs: int) -> Contrastive:
    return Contrastive(unit(pairs, 8), unit(pairs, 6))


def test_the_parts_share_no_pair_and_are_the_whole_target():
    question = ask()
    assert sorted(torch.cat(question.rows).tolist()) == list(range(PAIRS))
    assert sorted(map(len, question.rows)) == [7, 8, 8]
    whole, parts = question.gradient(HEADS), [question.gradient(HEADS, part) for part in question.parts]
    assert torch.allclose(torch.stack(parts).sum(0), whole, atol=1e-4 * whole.norm())


@pytest.mark.parametrize(
    ("pairs", "batch", "sizes"),
    [(34, 5, [[5, 7], [5, 6], [5, 6]]), (60, 5, [[5] * 4] * 3), (6, 50, [[2]] * 3), (21, 2, [[2, 2, 3]] * 3)],
)
def test_a_part_is_dealt_into_batches_and_a_small_last_one_joins_the_one_before_it(pairs, batch, sizes):
    question = ask(of_size(pairs), batch)
    assert [[len(rows) for rows in part] for part in question.parts] == sizes


@pytest.mark.parametrize("image", [torch.arange(60) // 5, torch.arange(60) % 12, torch.arange(60) // 4])
def test_captions_of_an_image_share_a_part_and_no_batch(image):
    question = deal("a", of_size(len(image)), 8, 0, image)
    assert sorted(torch.cat(question.rows).tolist()) == list(range(len(image)))
    assert_apart(question, image)
    assert all(len(rows) > 1 and len(image[rows].unique()) == len(rows) for rows in question.batches)


def assert_apart(question: Question, label: Tensor) -> None:
    seen = [set(label[rows].tolist()) for rows in question.rows]
    assert not any(a & b for a, b in itertools.combinations(seen, 2))


def test_pairs_of_one_caption_share_a_part():
    """A part that judges a filter is to know nothing of what the others ask about."""
    texts = unit(12, 6)[torch.arange(60) % 12]
    assert_apart(deal("a", Contrastive(unit(60, 8), texts), 8, 0), torch.arange(60) % 12)
    labels, prompts = torch.arange(60) % 10, unit(10, 2, 6)
    assert_apart(deal("a", ZeroShot(unit(60, 8), labels, prompts), 8, 0), labels)


def test_a_caption_of_two_images_keeps_both_and_all_their_captions_in_one_part():
    image, caption = torch.arange(60) // 2, torch.arange(60)
    caption[2::4] = caption[1::4]  # the second caption of an image is the first one of the next
    texts = unit(60, 6)[caption]
    assert_apart(deal("a", Contrastive(unit(60, 8), texts), 8, 0, image), torch.arange(60) // 4)


def test_pairs_of_one_caption_are_spread_over_the_batches():
    """They would be each other's negatives."""
    caption = torch.arange(600) % 12
    dealt = deal("a", Contrastive(unit(600, 8), unit(12, 6)[caption]), 50, 0).batches
    assert min(len(caption[rows].unique()) for rows in dealt) == 4  # all that the part has


def test_a_target_of_too_few_pairs_is_refused_by_name():
    with pytest.raises(ValueError, match="target a: 5 pairs are too few to ask, it takes at least 6"):
        ask(of_size(5))


@pytest.mark.parametrize("image", [None, torch.arange(23), 100 - torch.arange(23)])
def test_images_with_one_caption_each_are_dealt_as_pairs(image):
    dealt = [rows.tolist() for rows in deal("a", of_size(23), 5, 0, image).batches]
    assert dealt == [rows.tolist() for rows in ask().batches]


@pytest.mark.parametrize("image", [torch.zeros(9), torch.arange(9) % 3])
def test_few_images_with_many_captions_can_still_be_asked(image):
    question = deal("a", of_size(9), 5, 0, image.long())
    assert all(len(rows) > 1 for rows in question.batches)
    assert sorted(torch.cat(question.batches).tolist()) == list(range(9))


def test_a_deal_depends_on_name_and_seed_alone():
    dealt = lambda question: [rows.tolist() for rows in question.batches]  # noqa: E731
    assert dealt(ask()) == dealt(ask(LOSSES["retrieval margin"]))
    assert dealt(ask()) != dealt(ask(seed=1))
    assert dealt(ask()) != dealt(deal("b", LOSSES["contrastive"], 5, 0))


@pytest.mark.parametrize(("pairs", "groups"), [(23, 5), (200, CALIBRATION_GROUPS)])
def test_groups_are_the_batches_in_a_few_parts_of_about_the_same_size(pairs, groups):
    question = ask(of_size(pairs))
    assert len(question.groups) == groups
    assert max(map(len, question.groups)) - min(map(len, question.groups)) <= 1
    dealt = sorted(rows.tolist() for group in question.groups for rows in group)
    assert dealt == sorted(rows.tolist() for rows in question.batches)


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_refits_move_along_the_gradients_of_their_groups(name):
    question, step = ask(LOSSES[name]), 1e-2
    for i, group in enumerate(question.groups):
        along = question.gradient(HEADS, group)
        image, text = HEADS.split(along / along.norm() * step)
        ends = [Heads(HEADS.image + s * image, HEADS.text + s * text, 5.0) for s in (1, -1)]
        ahead, behind = (question.group_losses(heads)[i] for heads in ends)
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx(along.norm().item(), rel=0.05)


def test_models_are_compared_at_their_best_temperature():
    question, warmer = ask(LOSSES["zero-shot"]), HEADS._replace(logit_scale=10.0)
    assert question.mean_loss(warmer) == pytest.approx(question.mean_loss(HEADS), rel=0.05)
    assert question.group_losses(warmer).sum() > 1.2 * question.group_losses(HEADS).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_a_part_is_judged_by_its_own_pairs(name):
    rows = ask().rows[0]
    own = {
        "contrastive": Contrastive(IMAGES[rows], TEXTS[rows]),
        "retrieval margin": RetrievalMargin(IMAGES[rows], TEXTS[rows], 0.3),
        "zero-shot": ZeroShot(IMAGES[rows], LABELS[rows], PROMPTS),
    }[name.partition(",")[0]]
    alone = ask(own).mean_loss(HEADS)
    assert ask(LOSSES[name]).mean_loss(HEADS, rows) == pytest.approx(alone, rel=1e-5)


def test_a_target_with_nothing_left_to_improve_is_named():
    right = RetrievalMargin(torch.eye(6, 8), torch.eye(6), 1e-6)
    with pytest.raises(ValueError, match="target a: its loss retrieval_margin has no gradient"):
        ask(right).gradient(Heads(torch.eye(8, 6), torch.eye(6), 5.0))


def test_coverage_counts_distinct_captions():
    """Many copies of a caption are one thing that the corpus is about."""
    captions = unit(40, 6)
    often = torch.cat([captions, captions[[3] * 50]])
    assert 0 < coverage_of(ask(), HEADS, captions, 0) == coverage_of(ask(), HEADS, often, 0) < 1


def test_coverage_of_a_large_corpus_is_estimated_from_some_of_its_captions():
    captions, question = unit(4 * COVERED_CAPTIONS, 6), ask(of_size(300))
    some = coverage_of(question, HEADS, captions, 0)
    assert some == coverage_of(question, HEADS, captions.flip(0), 0), "whatever their order"
    others = coverage_of(question, HEADS, captions, 1)
    assert some != others
    assert some == pytest.approx(others, abs=0.1)


def test_a_labelled_target_asks_about_the_first_prompt_of_every_image_s_class():
    assert torch.equal(LOSSES["zero-shot"].captions(), torch.stack([PROMPTS[label, 0] for label in LABELS]))
    assert torch.equal(LOSSES["retrieval margin"].captions(), TEXTS)
