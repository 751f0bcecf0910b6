"""What a target asks of the model: a loss as a function of the heads, whose gradient influence is projected on.

A kind of target is a subclass of `TargetLoss` with two methods: the similarities of a batch, and its loss in them. Sum
convention, as in training: a target's loss is the sum over its pairs, not their mean.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ecif.heads import Heads, embed, logits

TEMPERATURES = 16.0  # a calibrated scale stays within this factor of the model's own: separable pairs would take it to infinity


class TargetLoss(ABC):
    """A target's pairs and the loss on them.

    Args:
        calibrated: the loss is min over tau of L(tau S), at its own best temperature; otherwise a change of confidence, which
            decides no ranking, drowns the change of ranking. By the envelope theorem its gradient is that of L(tau S) at the
            best tau held fixed. All batches of a call share one tau.
    """

    def __init__(self, calibrated: bool = False):
        self.calibrated = calibrated

    @abstractmethod
    def similarities(self, heads: Heads, batches: list[Tensor]) -> list[Tensor]:
        """The matrix that each batch's loss is a function of, differentiable in the heads."""

    @abstractmethod
    def batch_loss(self, similarity: Tensor, rows: Tensor) -> Tensor:
        """Loss, a scalar, of the pairs at `rows`, whose similarities these are."""

    def value(self, heads: Heads, batches: list[Tensor]) -> Tensor:
        """Loss of some of the target's pairs, a scalar in loss units.

        Args:
            heads: the heads to ask.
            batches: rows of the target; those of one batch are each other's negatives where the loss has negatives.
        """
        similarities = self.similarities(heads, batches)
        if self.calibrated:
            fixed = [s.detach().double() for s in similarities]
            tau = best_temperature(lambda tau: self._sum([tau * s for s in fixed], batches))
            similarities = [tau * s for s in similarities]
        return self._sum(similarities, batches)

    def gradient(self, heads: Heads, batches: list[Tensor]) -> Tensor:
        """Gradient [P] of `value` with respect to both heads."""
        weights = heads.flat().detach().requires_grad_()
        image, text = heads.split(weights)
        moved = heads._replace(image=image, text=text)
        log_scale, bias = heads.split_scalars(weights)
        if heads.train_logit_scale:
            moved = moved._replace(logit_scale=log_scale.exp())  # type: ignore[arg-type]  # a tensor, to differentiate
        if heads.train_logit_bias:
            moved = moved._replace(logit_bias=bias)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(self.value(moved, batches), weights)
        return gradient

    def _sum(self, similarities: list[Tensor], batches: list[Tensor]) -> Tensor:
        return torch.stack([self.batch_loss(s, rows) for s, rows in zip(similarities, batches, strict=True)]).sum()


class OfPairs(TargetLoss):
    """A loss on images [N, d_x] and the captions [N, d_t] that belong to them."""

    def __init__(self, images: Tensor, texts: Tensor, calibrated: bool = False):
        super().__init__(calibrated)
        self.images, self.texts = images, texts

    def similarities(self, heads: Heads, batches: list[Tensor]) -> list[Tensor]:
        """Logits S [B, B] of each batch, row = text."""
        return [logits(heads, embed(heads, self.images[rows], self.texts[rows])) for rows in batches]


def best_temperature(loss: Callable[[Tensor], Tensor]) -> float:
    """The tau > 0 that minimises a loss which is convex in tau, by Newton's method in log tau, kept within a bracket.

    Args:
        loss: L(tau) of a float64 scalar, twice differentiable.

    Returns:
        The minimiser; a bound of the bracket [1 / TEMPERATURES, TEMPERATURES] where the loss still falls there.
    """
    low, high, log_tau = -math.log(TEMPERATURES), math.log(TEMPERATURES), 0.0
    for _ in range(64):
        x = torch.tensor(log_tau, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(x.exp()), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, x)
        # The slope's sign changes once, from below: bisection is always right, Newton's step when it stays inside.
        low, high = (low, log_tau) if slope > 0 else (log_tau, high)
        newton = log_tau - slope.item() / curvature.item() if curvature > 0 else math.inf
        last, log_tau = log_tau, newton if low <= newton <= high else (low + high) / 2
        if abs(log_tau - last) < 1e-12:
            break
    return math.exp(log_tau)
