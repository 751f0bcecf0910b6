"""The probability that an image and its caption do not belong together, learned from planted caption swaps.

It is unknown which pairs of a corpus are misaligned, but misaligned pairs can be made. A planted swap is a held-out image with
the caption of another held-out pair. Its evidence is computed with heads that were fitted without either pair. Planted swaps
are then a sample of the misaligned pairs, and the corpus's own pairs are a mixture of good and misaligned ones:

    p_real(e) = (1 - share) p_good(e) + share p_planted(e),      log p_planted(e) / p_good(e) = w . e + c

This is presence-only data. It is fitted by expectation maximisation (Ward, Hastie et al., Biometrics 2009). Each real pair
counts as bad with its current probability. A logistic regression separates bad from good. The share is the mean probability. By
Bayes' rule,

    P(misaligned | e) = sigmoid(w . e + c + log share / (1 - share))

The probability is calibrated as far as real misalignment looks like a swap. Captions that merely say little are milder cases.

The ranking by this probability needs no share. The share itself is known only where the evidence tells planted swaps from the
good pairs: without that, the iteration ends about where it began. So it is checked against a bound that assumes nothing of the
good pairs: above any threshold there are at least share x (those of the swaps) among the real pairs,

    share <= p_real(e > t) / p_planted(e > t)        at every t

A share far below the bound means that many good pairs look like swaps, and it can't be told how many are.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.columns.contract import Column
from ecif.evaluation import auroc

MISALIGNMENT = Column(
    "misalignment",
    "low",
    "probability",
    "Probability that image and caption do not belong together, calibrated on caption swaps that the run plants itself.",
)
SHARE = 0.2  # the misaligned share at the start of the iteration
ITERATIONS = 200
SEPARATED = 0.65  # AUROC of planted swaps against good pairs below which the share is unknown
THRESHOLDS = 19  # the bound is taken at as many quantiles of the planted swaps
DEVIATIONS = 3.0  # standard errors on both sides of the bound; the smallest of several is too small
NONE = 0.01  # a share smaller than this is as good as none
RIDGE = 0.01  # on the weights; without it they would grow without limit on a separable sample


class Misalignment(NamedTuple):
    """A logistic model that turns a pair's evidence into a probability; all float64."""

    centre: Tensor  # [E] median of the real pairs' evidence
    spread: Tensor  # [E] half the range between the 1st and the 99th percentile
    weights: Tensor  # [E + 1] of the log-odds of misalignment in the corpus; the last is the intercept
    share: Tensor  # [] estimated share of the corpus's pairs that are misaligned
    separation: Tensor  # [] AUROC of the planted swaps against the good pairs, whose share is taken as estimated
    bound: Tensor  # [2] the smallest upper bound of the share, less and plus its error

    def probability(self, evidence: Tensor) -> Tensor:
        """[N] in (0, 1): the probability that each pair is misaligned, from its evidence [N, E]."""
        return _log_odds(self.standardise(evidence), self.weights).sigmoid()

    @property
    def known_share(self) -> float | None:
        """The share, or None if the evidence does not tell swaps from good pairs, or the share is far from the bound."""
        low, high = self.bound.tolist()
        fits = low / 2 - NONE <= self.share.item() <= 1.5 * high
        return self.share.item() if fits and self.separation >= SEPARATED else None

    @property
    def at_most(self) -> float:
        """The share is hardly larger than this, whatever the good pairs are like."""
        return max(self.bound[1].item(), self.known_share or 0.0)

    def standardise(self, evidence: Tensor) -> Tensor:
        """Evidence [N, E], centred and scaled to about -1 to 1, float64. Outliers beyond that grow by their logarithm only."""
        return ((evidence.double() - self.centre) / self.spread).asinh()


def learn_misalignment(real: Tensor, planted: Tensor) -> Misalignment:
    """Learn the model from the evidence of real pairs [N, E] and of planted swaps [M, E].

    Raises:
        ValueError: the evidence is not finite.
    """
    if not (real.isfinite().all() and planted.isfinite().all()):
        raise ValueError("evidence is not finite")
    low, centre, high = real.double().quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64), dim=0)
    spread = ((high - low) / 2).where(high > low, 1.0)
    weights, unknown = torch.zeros(real.shape[1] + 1, dtype=torch.float64), torch.full((2,), torch.nan).double()
    model = Misalignment(centre, spread, weights, torch.tensor(SHARE).double(), unknown[0], unknown)
    z, bad = model.standardise(real), model.standardise(planted)
    evidence = torch.cat([bad, z, z])
    label = torch.cat([torch.ones(len(bad) + len(z)), torch.zeros(len(z))]).double()
    probability = model.share.expand(len(z))
    for _ in range(ITERATIONS):
        weight = torch.cat([torch.ones(len(bad), dtype=torch.float64), probability, 1 - probability])
        weights = _logistic_step(evidence, label, weight, model.weights)
        # The regression's sample also holds the planted swaps, so its odds are converted to those of the corpus.
        count, share = probability.sum(), probability.mean()
        sampled = ((len(bad) + count) / (len(z) - count)).log()
        odds = _log_odds(z, weights) - sampled + (share / (1 - share)).log()
        probability = odds.sigmoid().clamp(1e-9, 1 - 1e-9)
        model = model._replace(weights=weights, share=share)
    shift = (model.share / (1 - model.share)).log() - sampled
    weights = model.weights + shift * torch.eye(len(model.weights), dtype=torch.float64)[-1]
    of_real, of_planted = _log_odds(z, weights), _log_odds(bad, weights)
    is_planted = torch.arange(len(of_planted) + len(of_real)) < len(of_planted)
    against_all = auroc(torch.cat([of_planted, of_real]), is_planted)
    separation = (against_all - model.share.item() / 2) / (1 - model.share.item())  # swaps against swaps are at 1/2
    return model._replace(weights=weights, separation=torch.tensor(separation).double(), bound=_bound(of_real, of_planted))


def _bound(real: Tensor, planted: Tensor) -> Tensor:
    """The smallest upper bound of the share [2], less and plus DEVIATIONS standard errors of its logarithm, at most 1.

    Args:
        real: log-odds [N] of the corpus's own pairs.
        planted: log-odds [M] of the planted swaps.
    """
    found = []
    for level in torch.linspace(0, 1, THRESHOLDS + 2, dtype=torch.float64)[1:-1]:
        threshold = planted.quantile(1 - level)
        p = max((real > threshold).double().mean().item(), 0.5 / len(real))
        q = max((planted > threshold).double().mean().item(), 0.5 / len(planted))
        error = DEVIATIONS * math.sqrt((1 - p) / (p * len(real)) + (1 - q) / (q * len(planted)))
        found.append((p / q * math.exp(error), p / q * math.exp(-error)))
    high, low = min(found)
    return torch.tensor([low, high], dtype=torch.float64).clamp(max=1.0)


def _log_odds(z: Tensor, weights: Tensor) -> Tensor:
    return z @ weights[:-1] + weights[-1]


def _logistic_step(z: Tensor, label: Tensor, weight: Tensor, weights: Tensor) -> Tensor:
    """One Newton step of weighted logistic regression with a ridge."""
    z1 = torch.cat([z, torch.ones_like(z[:, :1])], 1)
    ridge = torch.full_like(weights, RIDGE)
    ridge[-1] = 0.0
    p = (z1 @ weights).sigmoid()
    gradient = z1.T @ (weight * (p - label)) + ridge * weights
    hessian = (z1 * (weight * p * (1 - p))[:, None]).T @ z1 + torch.diag(ridge)
    return weights - torch.linalg.solve(hessian, gradient)
