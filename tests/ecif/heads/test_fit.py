import pytest
import torch

from ecif.heads import Heads, embed, logits, standardised
from ecif.heads.curvature import loss_gradient
from ecif.heads.fit import Course, fit, fixed_batches, reshuffled
from ecif.losses import CLIP, Clip, Dcl, SigLip, SoftInfoNCE
from tests.support.problems import fit_one, flat, random_features, random_heads, slow_logits, slow_loss

START = standardised(random_heads())
IMAGES, TEXTS = random_features(40)
BATCHES = list(torch.arange(40).split(10))
SETTINGS = {"batch_size": 10, "epochs": 5, "learning_rate": 0.02, "seed": 0}


def whole_loss(heads, loss=CLIP):
    """Of all batches."""
    return sum(loss.batch_loss(logits(heads, embed(heads, IMAGES[rows], TEXTS[rows]))) for rows in BATCHES)


@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_fit_is_adam_with_cosine_decay_on_the_mean_loss_and_the_square_of_the_distance_to_the_start(pull):
    weights, origin = flat(START).clone().requires_grad_(), flat(START).clone()
    optimiser = torch.optim.Adam([weights], lr=0.02)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 20)
    order = torch.Generator().manual_seed(0)
    for _ in range(5):
        for i in torch.randperm(4, generator=order).tolist():
            optimiser.zero_grad()
            rows = BATCHES[i]
            loss = slow_loss(slow_logits(START, weights, IMAGES[rows], TEXTS[rows])) / 20
            (loss + pull / 2 * (weights - origin).square().sum()).backward()
            optimiser.step()
            decay.step()
    fitted = fit_one(START, IMAGES, TEXTS, fixed_batches(BATCHES), **SETTINGS, pull=pull)[-1]
    assert torch.allclose(flat(fitted), weights.detach(), rtol=1e-6)


@pytest.mark.parametrize("loss", [Clip(), SigLip(), Dcl(), SoftInfoNCE()])
def test_every_loss_is_lowered(loss):
    start = START._replace(train_logit_scale=True, train_logit_bias=loss.has_bias)
    fitted = fit_one(start, IMAGES, TEXTS, fixed_batches(BATCHES), **SETTINGS, loss=loss)[-1]
    before, after = (whole_loss(h, loss) for h in (start, fitted))
    assert after < before - 0.1 * before.abs()
    assert fitted.logit_scale != start.logit_scale
    assert (fitted.logit_bias != 0) == loss.has_bias


def test_the_sigmoid_loss_is_fitted_to_the_minimum_in_its_bias_whatever_the_checkpoints_own():
    fitted = []
    for own in (0.0, -10.0):
        start = START._replace(logit_bias=own, train_logit_bias=True)
        fitted.append(fit_one(start, IMAGES, TEXTS, fixed_batches(BATCHES), **SETTINGS, loss=SigLip())[-1])
        pairs = [embed(fitted[-1], IMAGES[rows], TEXTS[rows]) for rows in BATCHES]
        assert loss_gradient(fitted[-1], pairs, SigLip())[-1].abs() < 1e-6
    assert fitted[0].logit_bias == pytest.approx(fitted[1].logit_bias)
    assert torch.allclose(fitted[0].image, fitted[1].image)


def test_fit_lowers_the_loss_and_leaves_the_start_alone():
    before = flat(START).clone()
    fitted = fit_one(START, IMAGES, TEXTS, fixed_batches(BATCHES), **SETTINGS)[-1]
    assert whole_loss(fitted) < 0.9 * whole_loss(START)
    assert torch.equal(flat(START), before)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, again = (fit_one(START, IMAGES, TEXTS, fixed_batches(BATCHES), **SETTINGS)[-1] for _ in range(2))
    other = fit_one(START, IMAGES, TEXTS, fixed_batches(BATCHES), **SETTINGS | {"seed": 1})[-1]
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(other))


def test_a_pair_taken_out_of_its_batch_takes_out_its_own_terms_only():
    # One step of plain gradient: the difference is the gradient of Pos_n + Neg_n over the nominal batch size.
    rows, rest = torch.arange(10), torch.arange(1, 10)
    weights = flat(START).requires_grad_()
    whole, less = (slow_loss(slow_logits(START, weights, IMAGES[r], TEXTS[r])) / 20 for r in (rows, rest))
    difference = torch.autograd.grad(whole - less, weights)[0]
    with_n, without_n = (loss_gradient(START, [embed(START, IMAGES[r], TEXTS[r])]) / 20 for r in (rows, rest))
    assert torch.allclose(with_n - without_n, difference)


def test_reshuffled_gives_as_many_full_batches_as_asked_and_no_pair_twice_in_a_round():
    order = torch.Generator().manual_seed(0)
    batches = reshuffled(25, 8, 7)(order)
    assert [len(b) for b in batches] == [8] * 7
    first_round = torch.cat(batches[:3])
    assert len(first_round.unique()) == 24
    assert len(reshuffled(5, 8, 2)(order)) == 2  # fewer pairs than a batch: one small batch a round


def test_emptied_batches_do_no_harm():
    batches = [torch.arange(10), torch.tensor([], dtype=torch.long), torch.tensor([3])]
    fitted = fit_one(START, IMAGES, TEXTS, fixed_batches(batches), **SETTINGS)[-1]
    assert isinstance(fitted, Heads)
    assert flat(fitted).isfinite().all()


def test_with_a_pull_there_is_a_minimum_that_does_not_depend_on_the_learning_rate():
    long = SETTINGS | {"epochs": 200, "pull": 2.0}
    slow, fast = (
        fit_one(START, IMAGES, TEXTS, fixed_batches(BATCHES), **long | {"learning_rate": r})[-1] for r in (0.005, 0.02)
    )
    moved = (flat(fast) - flat(START)).norm()
    assert (flat(fast) - flat(slow)).norm() < 0.1 * moved


def test_no_epoch_leaves_the_heads_as_they_are():
    path = fit_one(START, IMAGES, TEXTS, fixed_batches(BATCHES), **SETTINGS | {"epochs": 0}, checkpoints=2)
    assert [torch.equal(flat(heads), flat(START)) for heads in path] == [True, True]


def test_without_an_epoch_a_trained_bias_is_the_best_one():
    start = START._replace(logit_bias=0.0, train_logit_bias=True)
    none = fit_one(start, IMAGES, TEXTS, fixed_batches(BATCHES), **SETTINGS | {"epochs": 0}, loss=SigLip())[-1]
    pairs = [embed(none, IMAGES[rows], TEXTS[rows]) for rows in BATCHES]
    assert loss_gradient(none, pairs, SigLip())[-1].abs() < 1e-6


@pytest.mark.parametrize("loss", [Clip(), SigLip(), Dcl(), SoftInfoNCE()])
@pytest.mark.parametrize("parameters", ["heads", "heads and scalars"])
def test_fits_together_are_what_each_is_alone(loss, parameters):
    scalars = parameters != "heads"
    start = START._replace(train_logit_scale=scalars, train_logit_bias=scalars and loss.has_bias)
    random = torch.Generator().manual_seed(3)
    shrunken = [[rows[torch.rand(len(rows), generator=random) < 0.6] for rows in BATCHES] for _ in range(3)]
    shrunken[1][2] = shrunken[1][2][:0]
    courses = [Course(fixed_batches(batches), seed, 0.3 * seed) for seed, batches in enumerate(shrunken)]
    courses.append(Course(reshuffled(len(IMAGES), 10, 4), 7))
    how = {"batch_size": 10, "epochs": 3, "learning_rate": 0.02, "loss": loss, "checkpoints": 2}
    alone = [fit(start, IMAGES, TEXTS, [course], **how)[0] for course in courses]
    for ours, truth in zip(fit(start, IMAGES, TEXTS, courses, **how), alone, strict=True):
        assert len(ours) == 2
        for heads, own in zip(ours, truth, strict=True):
            assert torch.allclose(heads.flat(), own.flat(), rtol=1e-9, atol=1e-12)
