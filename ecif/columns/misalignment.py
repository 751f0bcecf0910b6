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
good pairs: without that, the iteration ends about where it began. So it is checked against bounds that assume nothing of the
good pairs. If the misaligned pairs are like swaps, there are at least share x (swaps above t) real pairs above any threshold t:

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
from ecif.evaluation import auroc

MISALIGNMENT = Column(
    "misalignment",
    "low",
    "probability",
    "Probability that image and caption do not belong together, calibrated on caption swaps that the run plants itself.",
)
SHARE = 0.2  # the misaligned share at the start of the iteration
ITERATIONS = 200  # at most
CONVERGED = 1e-7  # change of the share at which the iteration ends
SEPARATED = 0.65  # AUROC of planted swaps against good pairs below which the share is unknown
THRESHOLDS = 19  # the bound is taken at as many quantiles of the planted swaps
DEVIATIONS = 3.0  # standard errors on both sides of a share and of its bounds
MILDEST = 0.05  # of the swaps: what is milder than all but these is beyond the interval
ALONE = (0.05, 2.0)  # one kind of evidence that finds more than the first, plus the second times the share, contradicts it
REFITTED = 30  # iterations without one fold; they begin where those on all pairs ended
NONE = 0.01  # a share smaller than this is as good as none
RIDGE = 0.01  # on the weights; without it they would grow without limit on a separable sample


class Misalignment(NamedTuple):
    """A logistic model that turns a pair's evidence into a probability; all float64."""

    centre: Tensor  # [E] median of the real pairs' evidence
    spread: Tensor  # [E] half the range between the 1st and the 99th percentile
    weights: Tensor  # [E + 1] of the log-odds of misalignment in the corpus; the last is the intercept
    share: Tensor  # [] estimated share of the corpus's pairs that are misaligned
    error: Tensor  # [] standard error of the share: a jackknife over folds, as copies share one
    separation: Tensor  # [] AUROC of the planted swaps against the good pairs, whose share is taken as estimated
    bound: Tensor  # [] the smallest upper bound of the share of pairs that are like swaps, plus its error
    mild: Tensor  # [] the share of pairs that look at least as bad as all but MILDEST of the swaps, plus its error
    alone: Tensor  # [] the largest share that one kind of evidence finds by itself, of those that tell swaps from good pairs

    def probability(self, evidence: Tensor) -> Tensor:
        """[N] in (0, 1): the probability that each pair is misaligned, from its evidence [N, E]."""
        return _log_odds(self.standardise(evidence), self.weights).sigmoid()

    @property
    def known_share(self) -> float | None:
        """The share; None if the evidence does not tell swaps from good pairs, or the share contradicts its bounds."""
        share, (much, times) = self.share.item(), ALONE
        fits = share <= 1.5 * self.bound.item() and self.alone.item() <= much + times * share
        return share if fits and self.separation >= SEPARATED else None

    @property
    def interval(self) -> tuple[float, float]:
        """The share is hardly outside of these, 0 to 1, unless the noise is milder than swaps are."""
        share, error = self.known_share or 0.0, DEVIATIONS * self.error.item()
        high = max(self.bound.item(), self.mild.item(), self.alone.item(), share + error if share else 0.0)
        return max(0.0, share - error), min(1.0, high)

    def standardise(self, evidence: Tensor) -> Tensor:
        """Evidence [N, E], centred and scaled to about -1 to 1, float64. Outliers beyond that grow by their logarithm only."""
        return ((evidence.double() - self.centre) / self.spread).asinh()


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
    if not (real.isfinite().all() and planted.isfinite().all()):
        raise ValueError("evidence is not finite")
    low, centre, high = real.double().quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64), dim=0)
    spread = ((high - low) / 2).where(high > low, 1.0)
    z, bad = (((evidence.double() - centre) / spread).asinh() for evidence in (real, planted))
    found = _maximise(z, bad, _Fit.begin(z), ITERATIONS)
    each = [(z[:, [i]], bad[:, [i]]) for i in range(z.shape[1])]
    singles = [(of, _maximise(*of, _Fit.begin(of[0]), ITERATIONS)) for of in each]
    alone = max([fit.share for of, fit in singles if _separation(*of, fit) >= SEPARATED], default=torch.zeros(()))
    fold, planted_fold = (torch.arange(len(of)) % 5 if f is None else f for f, of in ((fold, z), (planted_fold, bad)))
    others = [(fold != f, planted_fold != f) for f in fold.unique()]
    shares = [_maximise(z[a], bad[b], found.of(a), REFITTED).share for a, b in others if a.any() and b.any()]
    separation = torch.tensor(_separation(z, bad, found)).double()
    bounds = _bounds(_log_odds(z, found.weights), _log_odds(bad, found.weights))
    return Misalignment(centre, spread, found.weights, found.share, _jackknife(shares), separation, *bounds, alone.double())


class _Fit(NamedTuple):
    """A state of the iteration."""

    weights: Tensor  # of the log-odds of misalignment in the corpus
    share: Tensor
    probability: Tensor  # [N] that each real pair is bad

    @classmethod
    def begin(cls, z: Tensor) -> "_Fit":
        """Where the iteration begins, for real pairs z [N, E]."""
        share = torch.tensor(SHARE, dtype=torch.float64)
        return cls(torch.zeros(z.shape[1] + 1, dtype=torch.float64), share, share.expand(len(z)))

    def of(self, rows: Tensor) -> "_Fit":
        """The state of some of the real pairs."""
        return self._replace(probability=self.probability[rows])


def _maximise(z: Tensor, bad: Tensor, state: _Fit, iterations: int) -> _Fit:
    """Expectation and maximisation from a state on, for real pairs z [N, E] and swaps bad [M, E], both standardised."""
    evidence = torch.cat([bad, z, z])
    label = torch.cat([torch.ones(len(bad) + len(z)), torch.zeros(len(z))]).double()
    weights, before, probability = state.weights, -1.0, state.probability
    intercept = torch.eye(len(weights), dtype=torch.float64)[-1]
    for _ in range(iterations):
        weight = torch.cat([torch.ones(len(bad), dtype=torch.float64), probability, 1 - probability])
        count, share = probability.sum(), probability.mean()
        # The regression's sample also holds the planted swaps, so its odds are converted to those of the corpus.
        shift = (share / (1 - share)).log() - ((len(bad) + count) / (len(z) - count)).log()
        weights = _logistic_step(evidence, label, weight, weights - shift * intercept) + shift * intercept
        probability = _log_odds(z, weights).sigmoid().clamp(1e-9, 1 - 1e-9)
        if abs(share.item() - before) < CONVERGED:
            break
        before = share.item()
    return _Fit(weights, share, probability)


def _separation(z: Tensor, bad: Tensor, fit: _Fit) -> float:
    """AUROC of swaps bad [M, E] against the good ones among the real pairs z [N, E], whose share is taken as fitted."""
    is_planted = torch.arange(len(bad) + len(z)) < len(bad)
    against_all = auroc(torch.cat([_log_odds(bad, fit.weights), _log_odds(z, fit.weights)]), is_planted)
    share = fit.share.item()
    return (against_all - share / 2) / (1 - share)  # swaps against swaps are at 1/2


def _jackknife(shares: list[Tensor]) -> Tensor:
    """Standard error of a share, from those without one fold each."""
    found = torch.stack(shares)
    return ((len(found) - 1) * (found - found.mean()).square().mean()).sqrt()


def _bounds(real: Tensor, planted: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds of the share, each with DEVIATIONS standard errors of its logarithm, at most 1.

    Args:
        real: log-odds [N] of the corpus's own pairs.
        planted: log-odds [M] of the planted swaps.

    Returns:
        The smallest one over all thresholds, and the one at the threshold that all but MILDEST of the swaps exceed.
    """

    def at(level: float) -> float:
        threshold = planted.quantile(1 - level)
        p = max((real > threshold).double().mean().item(), 0.5 / len(real))
        q = max((planted > threshold).double().mean().item(), 0.5 / len(planted))
        error = DEVIATIONS * math.sqrt((1 - p) / (p * len(real)) + (1 - q) / (q * len(planted)))
        return min(1.0, p / q * math.exp(error))

    smallest = min(at((i + 1) / (THRESHOLDS + 1)) for i in range(THRESHOLDS))
    return torch.tensor(smallest).double(), torch.tensor(at(1 - MILDEST)).double()


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
