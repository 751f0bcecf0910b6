"""The probability that an image and its caption do not belong together, learned from planted caption swaps.

It is unknown which pairs of a corpus are misaligned, but misaligned pairs can be made. A planted swap is a held-out image with
the caption of another held-out pair. Its evidence is computed with heads that were fitted without either pair. Planted swaps
are then a sample of the misaligned pairs, and the corpus's own pairs are a mixture of good and misaligned ones:

    p_real(e) = (1 - share) p_good(e) + share p_planted(e),      log p_planted(e) / p_good(e) = w . e + c

This is presence-only data, and is fitted as such (`ecif.presence_only`). The share is the mean probability. By Bayes' rule,

    P(misaligned | e) = sigmoid(w . e + c + log share / (1 - share))

The probability is calibrated as far as real misalignment looks like a swap. Captions that merely say little are milder cases.

The ranking by this probability needs no share. The share itself is known only where the evidence tells planted swaps from the
good pairs: without that, it could be any. So it is checked against a bound that assumes nothing of the good pairs. If the
misaligned pairs are like swaps, there are at least share x (swaps above t) real pairs above any threshold t:

    share <= p_real(e > t) / p_planted(e > t)        at every t

Real noise can be milder than a swap. Boilerplate fits every image a little, and a caption of the same category nearly fits. The
iteration takes such pairs for good ones. The interval of the share does not: it ends where every pair that looks as bad as all
but the mildest MILDEST of the swaps were misaligned. Noise that is milder still is not in there, as nothing tells it from good
pairs. If one kind of evidence by itself finds far more misaligned pairs than all kinds together, the noise is unlike swaps, and
the share is unknown.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.columns.contract import Column
from ecif.presence_only import log_odds, maximise, separation, start

MISALIGNMENT = Column(
    "misalignment",
    "low",
    "probability",
    "Probability that image and caption do not belong together, calibrated on caption swaps that the run plants itself.",
)
SEPARATED = 0.65  # AUROC of planted swaps against good pairs below which the share is unknown
THRESHOLDS = 19  # the bound is taken at as many quantiles of the planted swaps
DEVIATIONS = 3.0  # standard errors on both sides of a share and of its bounds
MILDEST = 0.05  # of the swaps: what is milder than all but these is beyond the interval
ALONE = (0.05, 2.0)  # one kind of evidence that finds more than the first, plus the second times the share, contradicts it
TELLING = 0.8  # AUROC of planted swaps against good pairs from which one kind of evidence can contradict the others
NONE = 0.01  # a share smaller than this is as good as none


class Misalignment(NamedTuple):
    """A logistic model that turns a pair's evidence into a probability; all float64."""

    centre: Tensor  # [E] median of the real pairs' evidence
    spread: Tensor  # [E] half the range between the 1st and the 99th percentile
    weights: Tensor  # [E + 1] of the log-odds of misalignment in the corpus; the last is the intercept
    share: Tensor  # [] estimated share of the corpus's pairs that are misaligned
    error: Tensor  # [] standard error of the share: a jackknife over folds, as copies share one
    separation: Tensor  # [] AUROC of the planted swaps against the good pairs, whose share is taken as estimated
    bound: Tensor  # [2] the smallest upper bound of the share of pairs that are like swaps, less and plus its error
    mild: Tensor  # [] the share of pairs that look at least as bad as all but MILDEST of the swaps, plus its error
    alone: Tensor  # [] the largest share that one kind of evidence finds by itself, of those that tell swaps well (TELLING)

    def probability(self, evidence: Tensor) -> Tensor:
        """[N] in (0, 1): the probability that each pair is misaligned, from its evidence [N, E]."""
        return log_odds(self.standardise(evidence), self.weights).sigmoid()

    @property
    def known_share(self) -> float | None:
        """The share; None if the evidence does not tell swaps from good pairs, or the share contradicts its bounds."""
        share, (low, high), (much, times) = self.share.item(), self.bound.tolist(), ALONE
        fits = low / 2 - NONE <= share <= 1.5 * high and self.alone.item() <= much + times * share
        return share if fits and self.separation >= SEPARATED else None

    @property
    def interval(self) -> tuple[float, float]:
        """The share is hardly outside of these, 0 to 1, unless the noise is milder than swaps are."""
        share, error = self.known_share or 0.0, DEVIATIONS * self.error.item()
        high = max(self.mild.item(), self.alone.item(), share + error if share else 0.0)
        return max(0.0, share - error), min(1.0, high)

    def standardise(self, evidence: Tensor) -> Tensor:
        """Evidence [N, E], centred and scaled to about -1 to 1, float64. Outliers beyond that grow by their logarithm only."""
        return _standardise(evidence, self.centre, self.spread)


def learn_misalignment(
    real: Tensor, planted: Tensor, fold: Tensor | None = None, planted_fold: Tensor | None = None
) -> Misalignment:
    """Learn the model from the evidence of real pairs [N, E] and of planted swaps [M, E].

    Args:
        real: evidence of the corpus's own pairs.
        planted: evidence of planted swaps.
        fold: [N] of the real pairs; by default row n is in fold n mod 5.
        planted_fold: [M] of the swaps.

    Raises:
        ValueError: the evidence is not finite.
    """
    centre, spread, z, bad = _standardised(real, planted)
    found = maximise(z, bad, start(z))
    fold, planted_fold = (torch.arange(len(of)) % 5 if f is None else f for f, of in ((fold, z), (planted_fold, bad)))
    others = [(fold != f, planted_fold != f) for f in fold.unique()]
    error = _jackknife([maximise(z[a], bad[b], found.weights).share for a, b in others if a.any() and b.any()])
    each = [(z[:, [i]], bad[:, [i]]) for i in range(z.shape[1])]
    singles = [(of, maximise(*of, start(of[0]))) for of in each]
    alone = max([fit.share for of, fit in singles if separation(*of, fit) >= TELLING], default=torch.zeros(()).double())
    told = torch.tensor(separation(z, bad, found)).double()
    bound, mild = _bounds(log_odds(z, found.weights), log_odds(bad, found.weights))
    return Misalignment(centre, spread, found.weights, found.share, error, told, bound, mild, alone)


def misaligned_probability(real: Tensor, planted: Tensor) -> Tensor:
    """[N] the probability of the real pairs alone, as `learn_misalignment` finds it; arguments and errors are the same."""
    _, _, z, bad = _standardised(real, planted)
    return log_odds(z, maximise(z, bad, start(z)).weights).sigmoid()


def _standardise(evidence: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    return ((evidence.double() - centre) / spread).asinh()


def _standardised(real: Tensor, planted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre and spread of the real pairs' evidence, and the evidence of both in these units."""
    if not (real.isfinite().all() and planted.isfinite().all()):
        raise ValueError("evidence is not finite")
    low, centre, high = real.double().quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64), dim=0)
    spread = ((high - low) / 2).where(high > low, 1.0)
    return centre, spread, _standardise(real, centre, spread), _standardise(planted, centre, spread)


def _jackknife(shares: list[Tensor]) -> Tensor:
    """Standard error of a share, from those without one fold each; infinite if there are not two."""
    if len(shares) < 2:
        return torch.tensor(math.inf, dtype=torch.float64)
    found = torch.stack(shares)
    return ((len(found) - 1) * (found - found.mean()).square().mean()).sqrt()


def _bounds(real: Tensor, planted: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds of the share, at most 1.

    Args:
        real: log-odds [N] of the corpus's own pairs.
        planted: log-odds [M] of the planted swaps.

    Returns:
        [2] the smallest one over all thresholds, less and plus DEVIATIONS standard errors of its logarithm; and the one at the
        threshold that all but MILDEST of the swaps exceed, plus them.
    """

    def at(level: float) -> tuple[float, float]:
        threshold = planted.quantile(1 - level)
        p = max((real > threshold).double().mean().item(), 0.5 / len(real))
        q = max((planted > threshold).double().mean().item(), 0.5 / len(planted))
        error = DEVIATIONS * math.sqrt((1 - p) / (p * len(real)) + (1 - q) / (q * len(planted)))
        return p / q * math.exp(error), p / q * math.exp(-error)

    high, low = min(at((i + 1) / (THRESHOLDS + 1)) for i in range(THRESHOLDS))
    bound = torch.tensor([low, high], dtype=torch.float64).clamp(max=1.0)
    return bound, torch.tensor(min(1.0, at(1 - MILDEST)[0])).double()
