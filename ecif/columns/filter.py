"""Which pairs to keep for a target: candidates are tried by refitting the heads, and the best one ranks every pair.

A pair can be misaligned, and a pair can harm the target. The best weight between the two, and the best number of pairs to keep,
depend on the corpus. A candidate ranks the sampled pairs by a weighted mean of both ranks and drops the worst. The heads are
then refitted on the rest.

A filter chosen on a target overfits it, so its loss on that target is optimistic. We split the target in two: one half ranks
the pairs, both halves measure the refitted heads. The ranking half is optimistic; the other half is pessimistic, because pairs
that serve only its concepts were dropped first. Their mean has a smaller, slightly optimistic bias (docs/method.md).

The filter of a target does not depend on the other targets of a run.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.columns.contract import Column

QUANTILES = 1025  # points that store the sample's distribution of a score
OVERRATED = 0.01  # losses that differ by this share count as equal, as the ranking half overrates what it ranked for
ENOUGH_GAIN = 0.02  # with a smaller relative gain no pair is dropped; on a clean corpus the best candidate seemed to gain 0.012


class Candidate(NamedTuple):
    """A filter to try."""

    weight: float  # weight of influence, 0 to 1; misalignment has weight 1 - `weight`
    keep: float  # share of the pairs that are kept


class Choice(NamedTuple):
    """The filter that was chosen. `keep` is 1 if no candidate gains enough."""

    weight: float
    keep: float
    loss: float  # of the target after the refit


class Ranking(NamedTuple):
    """Ranks pairs of any shard as if they were in the sample. All tensors are float64.

    A pair's rank is its place among the quantiles of the sample, so it does not depend on the other pairs of the shard.
    """

    misalignment: Tensor  # [QUANTILES] quantiles of the sample's probabilities of misalignment
    influence: Tensor  # [QUANTILES] quantiles of the sample's influence on the target
    weight: Tensor  # [] weight of influence

    def scores(self, misalignment: Tensor, influence: Tensor) -> Tensor:
        """[N] float32 in 0 to 1: the higher its score, the earlier a pair is kept.

        Args:
            misalignment: [N] probabilities of misalignment.
            influence: [N] influence on the target.
        """
        aligned, helpful = 1 - _rank(misalignment, self.misalignment), _rank(influence, self.influence)
        return ((1 - self.weight) * aligned + self.weight * helpful).float()


def filter_column(target: str) -> Column:
    """The column of a target's filter."""
    return Column(
        f"filter_{target}",
        "high",
        "1",
        "How early the target's filter keeps the pair, 0 to 1: ranks of alignment and influence, weighted as refits chose.",
    )


def ranking(misalignment: Tensor, influence: Tensor, weight: float) -> Ranking:
    """The ranking by a weight of influence, with the quantiles of the sample.

    Args:
        misalignment: [N] probabilities of misalignment of the sampled pairs.
        influence: [N] influence of the sampled pairs on the target.
        weight: weight of influence, 0 to 1.
    """
    grid = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    known = [values.double().quantile(grid) for values in (misalignment, influence)]
    return Ranking(known[0], known[1], torch.tensor(weight, dtype=torch.float64))


def candidates(weights: list[float], keep: list[float]) -> list[Candidate]:
    """[1 + W K] the candidates to try: first to keep everything, then every weight with every share."""
    return [Candidate(0.0, 1.0), *(Candidate(*candidate) for candidate in product(weights, keep))]


def keep_mask(misalignment: Tensor, influence: Tensor, candidate: Candidate) -> Tensor:
    """[N] bool: the pairs of the sample that a candidate keeps.

    Args:
        misalignment: [N] probabilities of misalignment; their evidence has the influence on the ranking half.
        influence: [N] influence on the half of the target that ranks.
        candidate: the candidate to try.
    """
    score = (1 - candidate.weight) * _position(-misalignment) + candidate.weight * _position(influence)
    mask = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    mask[score.argsort(descending=True, stable=True)[: round(candidate.keep * len(score))]] = True
    return mask


def choose_candidate(weights: list[float], keep: list[float], losses: Tensor, aligned: float | None) -> Choice:
    """Choose the share to keep by its mean loss over all weights, then the weight at that share.

    The ranking half overrates the pairs that it ranked high, so losses within OVERRATED of the best count as equal. Among equal
    shares, the one nearest to the estimated share of aligned pairs is taken, or the
    largest if that share is unknown. Among equal weights, the smallest is taken,
    because it trusts influence the least.

    Args:
        weights: W candidate weights of influence.
        keep: K candidate shares of pairs to keep.
        losses: [1 + W K] loss of the target after each refit, in the order of `candidates`, mean over halves and seeds.
        aligned: estimated share of the pairs that are aligned; None if it is unknown.
    """
    everything, table = losses[0].item(), losses[1:].view(len(weights), len(keep))
    expected = 1.0 if aligned is None else aligned
    k = min(_equally_good(table.mean(0)), key=lambda i: abs(keep[i] - expected))
    w = min(_equally_good(table[:, k]), key=lambda i: weights[i])
    if table[:, k].min() < (1 - ENOUGH_GAIN) * everything:
        return Choice(weights[w], keep[k], table[w, k].item())
    return Choice(weights[w], 1.0, everything)


def _equally_good(losses: Tensor) -> list[int]:
    """Positions of the losses that count as equal to the best."""
    return [i for i, loss in enumerate(losses.tolist()) if loss <= (1 + OVERRATED) * losses.min().item()]


def _position(values: Tensor) -> Tensor:
    """[N] ranks, scaled to 0 to 1."""
    return values.argsort(stable=True).argsort() / max(1, len(values) - 1)


def _rank(values: Tensor, quantiles: Tensor) -> Tensor:
    """[N] float64 in 0 to 1: the position of values among quantiles, interpolated linearly."""
    values = values.double()
    within = values.clamp(quantiles[0], quantiles[-1])
    below = (torch.searchsorted(quantiles, within, right=True) - 1).clamp(0, len(quantiles) - 2)
    step, width = 1 / (len(quantiles) - 1), quantiles[below + 1] - quantiles[below]
    ranks = below * step + (step / width * (within - quantiles[below])).where(width > 0, step)
    return ranks.masked_fill(values < quantiles[0], 0.0)
