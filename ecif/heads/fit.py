"""Bring the heads to a minimum on cached features: influence is a statement about a minimum.

The trunks stay frozen (LiT, arXiv 2111.07991). Cosine heads have no minimum under plain weight decay (they are
scale-invariant), and many epochs memorise wrong pairs: the fit stops early instead, after a fixed number of epochs of Adam with
cosine decay.

A logit bias that is a parameter (SigLIP's) is solved for at every step, not stepped: all logits of a batch move with it, and
with any common move of the embeddings. Stepped beside the heads, the loss first grows a few times over, and a short fit never
recovers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ecif.heads import Embedded, Heads, embed, logits
from ecif.heads.curvature import loss_gradient
from ecif.losses import CLIP, Loss

BIAS_BATCHES = 16  # that the final bias is taken from
MARGIN = 20.0  # a bias further than this beyond the cosines' range is that of e^20 negatives

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
    loss: Loss = CLIP,
    checkpoints: int = 1,
) -> list[Heads]:
    """Train the heads on features of pairs, and the logit scale and bias where they are parameters.

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
        loss: what to minimise.
        checkpoints: how many sets of heads to return: after the first epoch, after the last, and evenly between; 1 is the last.

    Returns:
        The heads at these epochs; the fitted ones are the last.
    """
    order = torch.Generator().manual_seed(seed)
    schedule = [epoch(order) for _ in range(epochs)]
    steps = sum(len(batches) for batches in schedule)
    weights = start.flat()
    optimiser = torch.optim.Adam([weights], lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))

    def at(batches: list[Tensor]) -> tuple[Heads, list[Embedded]]:
        """The heads where the weights are, and batches embedded with them; a bias that is a parameter is the best for these."""
        heads = start.at(weights.clone())
        pairs = [embed(heads, images[rows], texts[rows]) for rows in (rows.to(images.device) for rows in batches)]
        return with_best_bias(heads, pairs, loss) if start.train_logit_bias else heads, pairs

    path, kept = [], {1 + round(i * (epochs - 1) / (checkpoints - 1)) for i in range(checkpoints - 1)} | {epochs}
    for done, batches in enumerate(schedule, 1):
        for rows in batches:
            weights.grad = loss_gradient(*at([rows]), loss) / (2 * batch_size)
            optimiser.step()
            decay.step()
        if done in kept:
            path.append(at(batches[:BIAS_BATCHES])[0])
    return path


def with_best_bias(heads: Heads, batches: list[Embedded], loss: Loss) -> Heads:
    """The heads with the logit bias that minimises the summed loss of some batches, which has to be convex in it."""
    plain = [logits(heads._replace(logit_bias=0.0), batch) for batch in batches]
    low, high = -heads.logit_scale - MARGIN, heads.logit_scale + MARGIN
    for _ in range(40):
        middle = (low + high) / 2
        rising = sum(loss.cotangent(s + middle).sum(dtype=torch.float64).item() for s in plain) > 0
        low, high = (low, middle) if rising else (middle, high)
    return heads._replace(logit_bias=(low + high) / 2)
