"""How far new pairs are from the sample that heads and directions were learned from."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.evaluation import auroc

SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity
ERRORS = 2.0  # a bound is passed by more than so many standard errors


class Measure(NamedTuple):
    """A number, and its standard error."""

    value: float
    error: float

    def is_beyond(self, bound: float) -> bool:
        """Whether it is above a bound by more than it is uncertain."""
        return self.value - ERRORS * self.error > bound


def difference(old: Tensor, new: Tensor) -> Measure:
    """The mean of new values [M] less that of old ones [N]."""
    error = sum((of.double().var() / len(of)).item() if len(of) > 1 else math.inf for of in (old, new))
    return Measure((new.double().mean() - old.double().mean()).item(), math.sqrt(error))


def telling(old: Tensor, old_fold: Tensor, new: Tensor, new_fold: Tensor) -> Measure:
    """How well a linear classifier tells new pairs from old ones: a classifier two-sample test (arXiv 1610.06545).

    The classifier is linear discriminant analysis with a shrunken covariance. It judges each fold after it was fitted on the
    others. Copies of a pair are in one fold, so that none is recognised by another.

    Args:
        old: [N, d] features.
        old_fold: [N] their folds.
        new: [M, d] features.
        new_fold: [M] their folds.

    Returns:
        The AUROC, 0.5 for pairs that are drawn alike, and its standard error (Hanley and McNeil, 1982). It is below 0.5 where
        each new pair has its like among the old ones, in another fold. NaN if no fold has both kinds of pairs in and outside.
    """
    total, weight = 0.0, 0
    for fold in old_fold.unique().tolist():
        mine = old_fold == fold, new_fold == fold
        if min(int(part.sum()) for of in mine for part in (of, ~of)) < 1:
            continue
        direction = _discriminant(old[~mine[0]].double(), new[~mine[1]].double())
        judged = [old[mine[0]].double() @ direction, new[mine[1]].double() @ direction]
        is_new = torch.cat([torch.zeros(len(judged[0])), torch.ones(len(judged[1]))]).bool()
        total += len(judged[1]) * auroc(torch.cat(judged), is_new)
        weight += len(judged[1])
    area = total / weight if weight else math.nan
    return Measure(area, _error(area, len(old), len(new)))


def _discriminant(old: Tensor, new: Tensor) -> Tensor:
    """[d] the direction along which new pairs are higher."""
    centred = torch.cat([old - old.mean(0), new - new.mean(0)])
    covariance = centred.T @ centred / len(centred)
    level = covariance.diagonal().mean()
    shrunken = (1 - SHRINKAGE) * covariance + SHRINKAGE * level * torch.eye(len(covariance), dtype=old.dtype)
    return torch.linalg.solve(shrunken, new.mean(0) - old.mean(0))


def _error(area: float, old: int, new: int) -> float:
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (new - 1) * (one - area**2) + (old - 1) * (two - area**2)
    return math.sqrt(max(0.0, spread) / (old * new))
