"""The order in which a target's filter keeps pairs: misaligned ones go first, then those that harm the target.

The probability of misalignment needs no target. Influence adds what the target knows, but its level says first of all how much
the target asks about a pair. Pairs that it does not ask about have an influence near 0, good ones and bad ones. A rank over all
pairs would drop them behind everything that helps. So influence is compared only among pairs whose captions are about as near
to the target (`ecif.columns.near`):

    z_n = influence_n - median of its bin,    score_n = rank(-p_n) + weight r_b tanh(z_n / 2 scale)

A pair that helps less than its equals is a suspect. A pair that the target says nothing about is neutral: the reliability r_b
of its bin is 0. It is the rank correlation of z and -p in the bin, relative to that of the best bin.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.columns.contract import Column

QUANTILES = 1025  # points that store the sample's distribution of a probability
BINS = 10  # of equal size, by nearness to the target
WEIGHT = 0.3  # of influence, where refits show that it should count
ENOUGH = 0.5  # a bin that has less than this share of its pairs, because many are equally near, has no reliability
RELIABLE = 0.5  # the scale is taken in bins that are at least so reliable, relative to the best
NORMAL = 1.4826  # the standard deviation of a normal distribution in units of its median absolute deviation


class Ranking(NamedTuple):
    """Ranks pairs of any shard as if they were in the sample. Numbers are float64.

    A pair's rank is its place among the quantiles of the sample, so it does not depend on the other pairs of the shard.
    """

    misalignment: Tensor  # [QUANTILES] quantiles of the sample's probabilities of misalignment
    edges: Tensor  # [BINS - 1] nearness at which the next bin begins
    median: Tensor  # [BINS] of influence in each bin
    reliability: Tensor  # [BINS] 0 to 1
    scale: Tensor  # [] standard deviation of influence within the reliable bins
    weight: Tensor  # [] of influence

    def scores(self, misalignment: Tensor, influence: Tensor, near: Tensor) -> Tensor:
        """[N] float32 in 0 to 1: the higher its score, the earlier a pair is kept.

        Args:
            misalignment: [N] probabilities of misalignment.
            influence: [N] influence on the target.
            near: [N] nearness of the captions to the target's.
        """
        aligned = 1 - _rank(misalignment, self.misalignment)
        bins = torch.searchsorted(self.edges, near.double().contiguous(), right=True)
        helps = self.reliability[bins] * ((influence.double() - self.median[bins]) / (2 * self.scale)).tanh()
        return ((aligned + self.weight * (1 + helps)) / (1 + 2 * self.weight)).float()

    def keep(self, misalignment: Tensor, influence: Tensor, near: Tensor, share: float) -> Tensor:
        """[N] bool: the best `share` of the pairs, exactly round(share N) of them; arguments are those of `scores`."""
        order = self.scores(misalignment, influence, near).argsort(descending=True, stable=True)
        mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        mask[order[: round(share * len(order))]] = True
        return mask


def filter_column(target: str) -> Column:
    """The column of a target's filter."""
    return Column(
        f"filter_{target}",
        "high",
        "1",
        "How early the target's filter keeps the pair, 0 to 1, by misalignment and, as far as refits chose it, influence.",
    )


def near_column(target: str) -> Column:
    """The column of a pair's nearness to a target."""
    return Column(
        f"near_{target}",
        "high",
        "cosine",
        "Of the caption with the target's nearest caption, by centred text features: whether the target asks about the pair.",
    )


def ranking(misalignment: Tensor, influence: Tensor, near: Tensor, weight: float) -> Ranking:
    """The ranking by a weight of influence, with what it has to know of the sample.

    Args:
        misalignment: [N] probabilities of misalignment of the sampled pairs.
        influence: [N] influence of the sampled pairs on the target.
        near: [N] nearness of their captions to the target's.
        weight: of influence, at least 0; with 0 it does not count.
    """
    p, influence, near = misalignment.double(), influence.double(), near.double()
    grid = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    edges = near.quantile(torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1])
    bins = torch.searchsorted(edges, near.contiguous(), right=True)
    median, found, z = torch.zeros(BINS).double(), torch.zeros(BINS).double(), torch.zeros_like(influence)
    for b in range(BINS):
        mine = bins == b
        if mine.sum() >= max(3, ENOUGH * len(p) / BINS):
            median[b] = influence[mine].median()
            z[mine] = influence[mine] - median[b]
            found[b] = _agreement(z[mine], -p[mine]).clamp(min=0)
    reliability = found / found.max() if found.max() > 0 else found
    trusted = z[(reliability >= RELIABLE)[bins]].abs()
    scale = NORMAL * trusted.median() if len(trusted) and trusted.any() else torch.ones(()).double()
    scale = scale.clamp(min=torch.finfo(torch.float64).tiny)
    return Ranking(p.quantile(grid), edges, median, reliability, scale, torch.tensor(weight, dtype=torch.float64))


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of two lists; 0 if one is constant."""
    ranks = torch.stack([values.argsort(stable=True).argsort().double() for values in (a, b)])
    constant = (a == a[0]).all() or (b == b[0]).all()
    return torch.zeros(()).double() if constant else torch.corrcoef(ranks)[0, 1]


def _rank(values: Tensor, quantiles: Tensor) -> Tensor:
    """[N] float64 in 0 to 1: the position of values among quantiles, interpolated linearly."""
    values = values.double()
    within = values.clamp(quantiles[0], quantiles[-1])
    below = (torch.searchsorted(quantiles, within, right=True) - 1).clamp(0, len(quantiles) - 2)
    step, width = 1 / (len(quantiles) - 1), quantiles[below + 1] - quantiles[below]
    ranks = below * step + (step / width * (within - quantiles[below])).where(width > 0, step)
    return ranks.masked_fill(values < quantiles[0], 0.0)
