"""Bring the heads to a minimum on cached features: influence is a statement about a minimum.

The trunks stay frozen (LiT, arXiv 2111.07991). Cosine heads have no minimum under plain weight decay (they are
scale-invariant), and many epochs memorise wrong pairs: the fit stops early instead, after a fixed number of epochs of Adam with
cosine decay.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ecif.curvature import loss_gradient
from ecif.heads import Heads, embed

Epoch = Callable[[torch.Generator], list[Tensor]]


def fixed_batches(batches: list[Tensor]) -> Epoch:
    """Every epoch visits the same batches in a new order: who shares a softmax never changes, as influence assumes."""
    return lambda order: [batches[i] for i in torch.randperm(len(batches), generator=order).tolist()]


def reshuffled(pairs: int, batch_size: int, steps: int) -> Epoch:
    """Every epoch deals `pairs` pairs into `steps` new batches, as trainers do: full batches, pairs again when all are dealt.

    With the same `steps`, a filtered corpus gets the same number of updates as the whole one.
    """
    full = max(1, pairs // batch_size)

    def deal(order: torch.Generator) -> list[Tensor]:
        rounds = range(-(-steps // full))
        dealt = [torch.randperm(pairs, generator=order)[: full * batch_size].split(batch_size) for _ in rounds]
        return [batch for batches in dealt for batch in batches][:steps]

    return deal


def fit(
    start: Heads,
    images: Tensor,
    texts: Tensor,
    epoch: Epoch,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> Heads:
    """Train both heads on features of pairs.

    Args:
        start: where to begin; use `standardised` heads so that the learning rate has its usual meaning.
        images: [N, d_x] features.
        texts: [N, d_t] features.
        epoch: `fixed_batches` or `reshuffled`.
        batch_size: the nominal one. Losses are divided by 2 * batch_size whatever a batch holds, so that a pair removed
            from a fixed batch takes out its own terms and nothing is reweighted.
        epochs: passes over the pairs; the learning rate falls to 0 over them on a half cosine.
        learning_rate: Adam's, at the start.
        seed: of the order of the batches; the start is not random.
    """
    order = torch.Generator().manual_seed(seed)
    schedule = [epoch(order) for _ in range(epochs)]
    steps = sum(len(batches) for batches in schedule)
    weights = torch.cat([start.image.flatten(), start.text.flatten()]).clone()
    optimiser = torch.optim.Adam([weights], lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    heads = Heads(*start.split(weights), start.logit_scale)  # views: they move with the weights
    for rows in (rows for batches in schedule for rows in batches):
        rows = rows.to(images.device)
        weights.grad = loss_gradient(heads, [embed(heads, images[rows], texts[rows])]) / (2 * batch_size)
        optimiser.step()
        decay.step()
    return heads
