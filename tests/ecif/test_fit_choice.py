"""The fit chooses itself: what it does to trained heads, with wrong pairs among those that judge, and to random heads."""

import functools

import pytest
import torch

from ecif.evaluation import calibrated_loss, retrieval_recall
from ecif.fit_choice import EPOCHS, LEARNING_RATES, PULLS, Grid, choose_fit, judge, largest_curvature
from ecif.heads import Heads, embed, logits, standardised
from ecif.heads.cross_fit import NO_FIT, HowToFit, Hyperparameters, Refit, run_fits
from ecif.heads.curvature import gauss_newton_product
from ecif.losses import CLIP, Clip, Dcl, SigLip
from ecif.sample import Sample
from tests.support.clip_like import clip_like, statistics

PAIRS, BATCH = 1024, 128
GRID = Grid()


@functools.cache
def drawn(wrong: float, noise: float = 1.2):
    """A sample with wrong pairs among it, and 768 right pairs that nothing sees."""
    world = clip_like(PAIRS + 2048, wrong, 192, 128, noise=noise)
    fold = torch.arange(PAIRS, dtype=torch.int16) % 4
    sample = Sample(world.images[:PAIRS], world.texts[:PAIRS], fold, [BATCH] * (PAIRS // BATCH))
    unseen = PAIRS + (~world.wrong[PAIRS:]).nonzero()[:768, 0]
    return standardised(world.heads), sample, world.images[unseen], world.texts[unseen]


def choose(start: Heads, sample: Sample, grid: Grid = GRID, loss=CLIP):
    how = HowToFit(start, loss, BATCH, NO_FIT)

    def run(jobs):
        return run_fits(how, sample.images, sample.texts, sample.batches(), jobs)

    choice = choose_fit(how, sample, grid, run, 0)
    everyone = Refit(torch.ones(len(sample.fold), dtype=torch.bool), 0)
    return choice, run([(choice.hyperparameters, everyone)])[0][-1]


def test_the_features_are_like_those_of_a_clip():
    found = statistics(clip_like(1200))
    assert found["right pairs"] == pytest.approx(0.31, abs=0.02)
    assert found["wrong pairs"] == pytest.approx(0.22, abs=0.02)
    assert found["two images"] == pytest.approx(0.55, abs=0.05)


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.4])
def test_trained_heads_are_not_ruined_however_many_pairs_are_wrong(wrong):
    start, sample, images, texts = drawn(wrong)
    choice, fitted = choose(start, sample)
    facts = choice.facts
    assert facts["chosen"]["held_out_loss"] <= facts["start"]["held_out_loss"]
    assert calibrated_loss(fitted, images, texts) <= calibrated_loss(start, images, texts) + 0.005
    assert retrieval_recall(fitted, images, texts, 1) >= retrieval_recall(start, images, texts, 1) - 0.01
    assert not choice.warnings()
    assert choice.line().startswith("held-out loss ")


def test_what_is_right_for_random_heads_ruins_trained_ones_and_is_warned_of():
    start, sample, images, texts = drawn(0.2)
    choice, fitted = choose(start, sample, Grid.of(1e-3, 8, 0.0, 2))
    assert choice.hyperparameters == Hyperparameters(1e-3, 8, 0.0)
    assert retrieval_recall(fitted, images, texts, 1) < retrieval_recall(start, images, texts, 1) - 0.05
    assert [line for line in choice.warnings() if "worse than the checkpoint" in line and "fit.learning_rate" in line]


def test_random_heads_are_fitted_far_and_the_checkpoint_is_said_to_be_untrained():
    _, sample, images, texts = drawn(0.2, noise=0.1)
    g = torch.Generator().manual_seed(5)
    start = standardised(Heads(torch.randn(192, 128, generator=g), torch.randn(192, 128, generator=g), 10.0))
    choice, fitted = choose(start, sample)
    assert (choice.hyperparameters.learning_rate, choice.hyperparameters.epochs, choice.hyperparameters.pull) == (1e-3, 8, 0.0)
    assert calibrated_loss(fitted, images, texts) < calibrated_loss(start, images, texts) - 0.1
    assert ["untrained" in line for line in choice.warnings()] == [True]


def test_where_nothing_beats_the_start_the_heads_stay_and_it_is_said():
    start, sample, *_ = drawn(0.2)
    choice, fitted = choose(start, sample, Grid([0.1], [4], [0.0]))
    assert choice.hyperparameters == NO_FIT
    assert torch.equal(fitted.image, start.image)
    assert choice.facts["chosen"] == {"learning_rate": 0.0, "epochs": 0, "pull": 0.0} | choice.facts["start"]
    assert "no fit improves on the checkpoint" in choice.line()
    assert ["can't be calibrated" in line for line in choice.warnings()] == [True]


@pytest.mark.parametrize("loss", [Dcl(), SigLip()], ids=lambda loss: loss.name)
def test_every_loss_chooses(loss):
    start, sample, images, texts = drawn(0.2)
    start = start._replace(train_logit_bias=loss.has_bias)
    choice, fitted = choose(start, sample, Grid([3e-4, 1e-2], [2], [0.0, 1.0]), loss)
    assert choice.facts["chosen"]["held_out_loss"] <= choice.facts["start"]["held_out_loss"]
    assert retrieval_recall(fitted, images, texts, 1) >= retrieval_recall(start, images, texts, 1) - 0.01


def test_held_out_pairs_are_judged_by_the_heads_that_have_not_seen_their_fold():
    start, sample, *_ = drawn(0.2)
    worse = start._replace(image=start.image + 0.3 * torch.randn(start.image.shape, generator=torch.Generator().manual_seed(1)))
    found = judge(HowToFit(start, Clip(), BATCH, NO_FIT), sample, {1: start, 3: worse}, 0)
    each = [judge(HowToFit(start, Clip(), BATCH, NO_FIT), sample, {f: h}, 0) for f, h in ((1, start), (3, worse))]
    assert found.held_out_loss == pytest.approx(sum(one.held_out_loss for one in each) / 2)
    assert each[0].held_out_loss < each[1].held_out_loss


def test_the_unit_of_the_pull_is_the_largest_eigenvalue_of_the_explicit_curvature():
    g = torch.Generator().manual_seed(0)
    heads = Heads(torch.randn(6, 3, generator=g), torch.randn(5, 3, generator=g), 5.0)
    images, texts = torch.randn(40, 6, generator=g), torch.randn(40, 5, generator=g)
    sample = Sample(images, texts, torch.zeros(40, dtype=torch.int16), [20, 20])
    pairs = embed(heads, images, texts)
    matrix = gauss_newton_product(heads, pairs, sample.batches(), torch.eye(heads.size), CLIP) / 80
    top = torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1].item()
    assert largest_curvature(HowToFit(heads, CLIP, 20, NO_FIT), sample) == pytest.approx(top, rel=0.03)
    assert logits(heads, pairs).isfinite().all()


def test_what_is_said_restricts_the_grid_and_nothing_else():
    assert len(Grid.of(None, None, None, 2).candidates()) == len(LEARNING_RATES) * len(EPOCHS) * len(PULLS)
    assert {c.learning_rate for c in Grid.of(0.5, None, None, 2).candidates()} == {0.5}
    assert {c.epochs for c in Grid.of(None, None, None, 3).candidates()} == {8}
    assert {c.epochs for c in Grid.of(None, None, None, 9).candidates()} == {9}
    assert Grid.of(0.5, 3, 0.0, 2).fixed
    assert not Grid.of(0.5, 3, None, 2).fixed
