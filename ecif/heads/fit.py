"""Fit the heads on cached features. Influence is derived at a minimum of the training loss, so the heads have to be near one.

The trunks stay frozen (LiT, arXiv 2111.07991). Many epochs memorise wrong pairs. The fit therefore stops early, after a fixed
number of epochs of Adam with cosine decay, or a pull holds the heads near their start (`ecif.fit_choice` chooses).

Where the logit bias is a parameter (SigLIP's), every step sets it to its best value; Adam does not step it. All logits of a
batch move with the bias, and also with any common move of the embeddings. If Adam steps both, the loss first grows several
times over, and a short fit never recovers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence

from ecif.heads import Embedded, Heads, embed, logits, logits_vjp
from ecif.heads.curvature import loss_gradient
from ecif.losses import CLIP, Loss
from ecif.losses.contract import isolate
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


class Course(NamedTuple):
    """What one of several fits has to itself."""

    epoch: Epoch  # `fixed_batches` or `reshuffled`; all fits have the same number of batches
    seed: int  # of the order of the batches; nothing else is random
    pull: float = 0.0  # pull / 2 |W - W_start|^2 is added to the loss of every step; logit scale and bias are free


def fit(
    start: Heads,
    images: Tensor,
    texts: Tensor,
    courses: list[Course],
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    loss: Loss = CLIP,
    checkpoints: int = 1,
) -> list[list[Heads]]:
    """Train copies of the heads on features of pairs, and also the logit scale and bias if they are parameters.

    One step of all copies is one computation, where the loss admits it. A GPU that takes one small step at a time is idle.

    Args:
        start: initial heads; use `standardised` heads so that the learning rate has its usual meaning.
        images: [N, d_x] features.
        texts: [N, d_t] features.
        courses: of the copies.
        batch_size: the nominal batch size. Losses are divided by 2 * batch_size even if a batch holds fewer or more pairs, so
            that removing a pair from a fixed batch takes out the pair's own terms and reweights no other.
        epochs: passes over the pairs. Over all of them, the learning rate falls to 0 on a half cosine. With 0, the heads stay,
            but for a trained bias, which is the best for the first batches.
        learning_rate: Adam's, at the start.
        loss: the loss to minimise.
        checkpoints: how many sets of heads to return: one after the first epoch, one after the last, the others evenly between.
            With 1, only the heads after the last epoch.

    Returns:
        Of every copy, the heads at these epochs, in order; the last are the fitted ones.
    """
    orders = [torch.Generator().manual_seed(course.seed) for course in courses]
    schedule = [_deal(courses, orders) for _ in range(epochs)]
    origin = start.flat()
    weights = origin.repeat(len(courses), 1)
    pulls = origin.new_tensor([[course.pull] for course in courses])
    projections = start.image.numel() + start.text.numel()
    optimiser = torch.optim.Adam([weights], lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, sum(len(dealt[0]) for dealt in schedule)))
    training = _Training(start, images, texts, loss)

    if not epochs:
        return [[heads] * checkpoints for heads in training.reached(weights, _deal(courses, orders))]
    path, kept = [], {1 + round(i * (epochs - 1) / (checkpoints - 1)) for i in range(checkpoints - 1)} | {epochs}
    for done, dealt in enumerate(schedule, 1):
        for batches in zip(*dealt, strict=True):
            weights.grad = training.gradients(weights, batches) / (2 * batch_size)
            weights.grad[:, :projections] += pulls * (weights - origin)[:, :projections]
            optimiser.step()
            decay.step()
        if done in kept:
            path.append(training.reached(weights, dealt))
    return [list(of_copy) for of_copy in zip(*path, strict=True)]


def _deal(courses: list[Course], orders: list[torch.Generator]) -> list[list[Tensor]]:
    """The batches of every copy in one epoch."""
    return [course.epoch(order) for course, order in zip(courses, orders, strict=True)]


class _Training(NamedTuple):
    """The training loss as a function of the parameters of K copies of the heads, [K, P]."""

    start: Heads
    images: Tensor  # [N, d_x]
    texts: Tensor  # [N, d_t]
    loss: Loss

    def gradients(self, weights: Tensor, batches: tuple[Tensor, ...]) -> Tensor:
        """[K, P]: the gradients of one batch of every copy."""
        scalars = self.start.train_logit_scale or self.start.train_logit_bias
        if len(batches) == 1 or scalars or not self.loss.padded:
            each = zip(weights, batches, strict=True)
            return torch.stack([loss_gradient(*self._at(point, [rows]), self.loss) for point, rows in each])
        rows = pad_sequence(list(batches), batch_first=True, padding_value=-1).to(self.images.device)
        return vmap(self._gradient)(weights, self.images[rows], self.texts[rows], rows < 0)

    def reached(self, weights: Tensor, dealt: list[list[Tensor]]) -> list[Heads]:
        """The heads of every copy. A trained bias is the best one for its first batches."""
        return [self._at(point, batches[:BIAS_BATCHES])[0] for point, batches in zip(weights, dealt, strict=True)]

    def _at(self, point: Tensor, batches: list[Tensor]) -> tuple[Heads, list[Embedded]]:
        """The heads at some parameters [P], and batches embedded with them. A trained bias is the best for these batches."""
        heads = self.start.at(point.clone())
        pairs = [embed(heads, self.images[rows], self.texts[rows]) for rows in (rows.to(point.device) for rows in batches)]
        return with_best_bias(heads, pairs, self.loss), pairs

    def _gradient(self, point: Tensor, images: Tensor, texts: Tensor, absent: Tensor) -> Tensor:
        """Gradient [P] of the loss of one batch, in which some places [B] have no pair."""
        heads = self.start.at(point)
        pairs = embed(heads, images, texts)
        return logits_vjp(heads, pairs, self.loss.cotangent(isolate(logits(heads, pairs), absent)))


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
