"""A small model really learns, from the pairs that it is told to, and the same inputs give the same model."""

import pytest
import torch

from ecif.training import build, measure, train
from ecif.training.augment import augmented
from ecif.training.draws import batches
from ecif.training.measures import recall
from tests.support.coloured import RECIPE, TINY, coloured


@pytest.fixture(scope="module")
def trained():
    model = build(TINY, 0)
    losses = train(model, coloured(64), torch.ones(64, dtype=torch.int32), RECIPE, 0)
    return model, losses


def test_the_loss_falls_to_what_repeated_captions_leave(trained):
    chance, least = torch.tensor(32.0).log(), torch.tensor(4.0).log()  # of 32 pairs in a batch 4 have the same caption
    losses = trained[1]
    assert losses[0] > 0.9 * chance
    assert least * 0.7 < sum(losses[-5:]) / 5 < least + 0.35 * (chance - least)


def test_it_generalises_to_unseen_images(trained):
    found = measure(trained[0], coloured(40, seed=5))
    assert found["zero_shot"] > 0.6
    assert found["loss"] < 0.8 * torch.tensor(40.0).log()


def test_the_same_inputs_give_the_same_model_and_other_seeds_another(trained):
    def weights(seed: int) -> torch.Tensor:
        model = build(TINY, seed)
        train(model, coloured(64), torch.ones(64, dtype=torch.int32), RECIPE._replace(steps=3), seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    torch.set_num_threads(before)


def test_every_parameter_is_trained(trained):
    start = dict(build(TINY, 0).named_parameters())
    assert [name for name, p in trained[0].named_parameters() if torch.equal(p, start[name])] == []


def test_fine_tuning_starts_from_the_weights(trained):
    tuned = build(TINY, 1, trained[0].state_dict())
    assert measure(tuned, coloured(40, seed=5)) == measure(trained[0], coloured(40, seed=5))


def test_counts_are_honoured():
    counts = torch.tensor([1, 0, 2, 1, 0, 2])
    drawn = torch.cat(list(batches(counts, 4, 30, 0)))
    assert torch.bincount(drawn, minlength=6).tolist() == (20 * counts).tolist()  # 120 pairs are 20 epochs of 6
    assert all(len(batch) == 4 for batch in batches(counts, 4, 30, 0))
    assert torch.equal(drawn, torch.cat(list(batches(counts, 4, 30, 0))))
    assert not torch.equal(drawn, torch.cat(list(batches(counts, 4, 30, 1))))
    with pytest.raises(ValueError, match="no pair is left"):
        next(batches(0 * counts, 4, 1, 0))


def test_a_view_is_a_crop_of_the_image_that_is_never_flipped():
    ramp = torch.linspace(0.2, 0.8, 32).expand(50, 3, 32, 32)  # brighter to the right
    views = augmented(ramp, 0.3, 0.0, torch.Generator().manual_seed(0))
    assert (views.diff(dim=3) >= -1e-6).all()  # no flip
    assert views.min() >= 0.2 - 1e-6
    assert views.max() <= 0.8 + 1e-6
    assert views.std(0).max() > 0.03  # the crops differ


def test_a_candidate_with_the_same_caption_is_no_wrong_answer():
    similarity = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert recall(similarity, torch.tensor([0, 0, 1]), 1) == pytest.approx(1 / 3)  # only the first query
    assert recall(similarity, torch.tensor([0, 1, 2]), 2) == pytest.approx(1 / 3)
    assert recall(similarity, torch.tensor([0, 1, 2]), 3) == 1
