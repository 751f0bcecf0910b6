"""Fit the heads on cached features. Influence is derived at a minimum of the training loss, so the heads have to be near one.

The trunks stay frozen (LiT, arXiv 2111.07991). Many epochs memorise wrong pairs. The fit therefore stops early, after a fixed
number of epochs of Adam with cosine decay, or a pull holds the heads near their start (`ecif.fit_choice` chooses).

Where the logit bias is a parameter (SigLIP's), every step sets it to its best value; Adam does not step it. All logits of a
batch move with the bias, and also with any common move of the embeddings. If Adam steps both, the loss first grows several
times over, and a short fit never recovers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ecif.heads import Embedded, Heads, embed, logits
from ecif.heads.curvature import loss_gradient
from ecif.losses import CLIP, Loss
from ecif.search import bisect

BIAS_BATCHES = 16  # a checkpoint's bias is the best one for this many batches
BIAS_HALVINGS = 40  # bisection steps of the search for the bias
MARGIN = 20.0  # the search goes this far beyond the logits; a bias there would be the best for e^20 negatives a positive

Epoch = Callable[[torch.Generator], list[Tensor]]


def fixed_batches(batches: list[Tensor]) -> Epoch:
    """Every epoch visits the same batches in a new order. The pairs of a softmax never change, as influence assumes."""
    return lambda order: [batches[i] for i in torch.randperm(len(batches), generator=order).tolist()]


def reshuffled(pairs: int, batch_size: int, steps: int) -> Epoch:
    """Every epoch shuffles the pairs into `steps` new full batches, as trainers do, with as many passes as that takes.

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
    pull: float = 0.0,
    loss: Loss = CLIP,
    checkpoints: int = 1,
) -> list[Heads]:
    """Train the heads on features of pairs, and also the logit scale and bias if they are parameters.

    Args:
        start: initial heads; use `standardised` heads so that the learning rate has its usual meaning.
        images: [N, d_x] features.
        texts: [N, d_t] features.
        epoch: `fixed_batches` or `reshuffled`.
        batch_size: the nominal batch size. Losses are divided by 2 * batch_size even if a batch holds fewer or more pairs, so
            that removing a pair from a fixed batch takes out the pair's own terms and reweights no other.
        epochs: passes over the pairs. Over all of them, the learning rate falls to 0 on a half cosine. With 0, the heads stay,
            but for a trained bias, which is the best for the first batches.
        learning_rate: Adam's, at the start.
        seed: of the order of the batches. Nothing else is random.
        pull: strength of the pull towards the start: pull / 2 |W - W_start|^2 is added to the loss of every step. It does not
            act on logit scale and bias.
        loss: the loss to minimise.
        checkpoints: how many sets of heads to return: one after the first epoch, one after the last, the others evenly between.
            With 1, only the heads after the last epoch.

    Returns:
        The heads at these epochs, in order; the last are the fitted ones.
    """
    order = torch.Generator().manual_seed(seed)
    schedule = [epoch(order) for _ in range(epochs)]
    steps = sum(len(batches) for batches in schedule)
    weights, origin = start.flat(), start.flat()
    projections = start.image.numel() + start.text.numel()
    optimiser = torch.optim.Adam([weights], lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))

    def at(batches: list[Tensor]) -> tuple[Heads, list[Embedded]]:
        """The heads at the current weights, and batches embedded with them. A trained bias is the best for these batches."""
        heads = start.at(weights.clone())
        pairs = [embed(heads, images[rows], texts[rows]) for rows in (rows.to(images.device) for rows in batches)]
        return with_best_bias(heads, pairs, loss), pairs

    if not epochs:
        return [at(epoch(order)[:BIAS_BATCHES])[0]] * checkpoints
    path, kept = [], {1 + round(i * (epochs - 1) / (checkpoints - 1)) for i in range(checkpoints - 1)} | {epochs}
    for done, batches in enumerate(schedule, 1):
        for rows in batches:
            weights.grad = loss_gradient(*at([rows]), loss) / (2 * batch_size)
            weights.grad[:projections] += pull * (weights - origin)[:projections]
            optimiser.step()
            decay.step()
        if done in kept:
            path.append(at(batches[:BIAS_BATCHES])[0])
    return path


def with_best_bias(heads: Heads, batches: list[Embedded], loss: Loss) -> Heads:
    """The heads with the logit bias that minimises the summed loss of some batches, if the bias is a parameter.

    The loss has to be convex in the bias.
    """
    if not heads.train_logit_bias:
        return heads
    plain = [logits(heads._replace(logit_bias=0.0), batch) for batch in batches]

    def loss_rises(bias: float) -> bool:
        return sum(loss.cotangent(s + bias).sum(dtype=torch.float64).item() for s in plain) > 0

    low, high = bisect(loss_rises, -heads.logit_scale - MARGIN, heads.logit_scale + MARGIN, BIAS_HALVINGS)
    return heads._replace(logit_bias=(low + high) / 2)
