"""Fit any parameters of a CLIP model on a sample. Influence is derived at a minimum of the training loss."""

from collections.abc import Sequence

import torch

from ecif.forward.mode import Batch, Logits, Parameters, flatten, loss_gradient, split


def fit(
    logits: Logits,
    start: Parameters,
    batches: Sequence[Batch],
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> Parameters:
    """Adam with cosine decay on the same batches every epoch, as `ecif.heads.fit.fit` does for the heads.

    Args:
        logits: S of a batch as a function of the parameters.
        start: the chosen parameters; their tensors are not changed.
        batches: every epoch visits them in a new order. The pairs of a batch never change, as influence assumes.
        batch_size: the nominal batch size. Losses are divided by 2 * batch_size, however many pairs a batch holds.
        epochs: passes over the batches. Over all of them, the learning rate falls to 0 on a half cosine.
        learning_rate: Adam's, at the start.
        seed: of the order of the batches.

    Returns:
        The fitted parameters under the names of `start`.
    """
    order = torch.Generator().manual_seed(seed)
    weights = flatten(start).clone()
    optimiser = torch.optim.Adam([weights], lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * len(batches)))
    parameters = split(start, weights)  # views: they move with the weights
    for _ in range(epochs):
        for i in torch.randperm(len(batches), generator=order).tolist():
            weights.grad = loss_gradient(logits, parameters, [batches[i]]) / (2 * batch_size)
            optimiser.step()
            decay.step()
    return parameters
