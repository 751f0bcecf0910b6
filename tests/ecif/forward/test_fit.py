import torch

from ecif.forward.fit import fit
from ecif.forward.mode import flatten
from ecif.losses.contrastive import batch_loss
from tests.support.perceptrons import BATCHES, PERCEPTRONS, of_flat, perceptrons

SETTINGS = {"batch_size": 6, "epochs": 3, "learning_rate": 0.01, "seed": 5}


def test_it_is_adam_with_cosine_decay_on_the_batches_in_seeded_order():
    w = flatten(PERCEPTRONS).clone().requires_grad_()
    optimiser = torch.optim.Adam([w], lr=0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 9)
    order = torch.Generator().manual_seed(5)
    for at in torch.cat([torch.randperm(3, generator=order) for _ in range(3)]).tolist():
        optimiser.zero_grad()
        (batch_loss(of_flat(perceptrons, PERCEPTRONS, BATCHES[at])(w)) / 12).backward()
        optimiser.step()
        decay.step()
    before = flatten(PERCEPTRONS)
    fitted = fit(perceptrons, PERCEPTRONS, BATCHES, **SETTINGS)
    assert list(fitted) == list(PERCEPTRONS)
    assert torch.allclose(flatten(fitted), w)
    assert torch.equal(flatten(PERCEPTRONS), before)


def test_it_lowers_the_loss_of_the_sample():
    fitted = fit(perceptrons, PERCEPTRONS, BATCHES, **SETTINGS)
    loss = lambda parameters: sum(batch_loss(perceptrons(parameters, b)) for b in BATCHES)  # noqa: E731
    assert loss(fitted) < 0.95 * loss(PERCEPTRONS)
