"""How likely an image and its caption do not belong together, learned from swaps that the method plants itself.

Which pairs of a corpus are misaligned is unknown, but misaligned pairs can be made: a held-out pair with the caption of
another. Both are scored by heads that saw neither. Planted swaps are then a sample of the bad pairs, real pairs a mixture:

    p_real(e) = (1 - share) p_good(e) + share p_planted(e),      log p_planted(e) / p_good(e) = w . e + c

Presence-only data, fitted by expectation and maximisation (Ward, Hastie et al., Biometrics 2009): each real pair counts as bad
by its own probability, a logistic regression tells bad from good, and the share is the mean of the probabilities. By Bayes,

    P(misaligned | e) = sigmoid(w . e + c + log share / (1 - share))

Calibrated as far as real misalignment looks like a swap: a caption that only says little is less bad than one of another image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ecif.columns.contract import Column

MISALIGNMENT = Column(
    "misalignment",
    "low",
    "probability",
    "Probability that image and caption do not belong together, calibrated on caption swaps that the run plants itself.",
)
SHARE = 0.2  # that the iteration starts from
ITERATIONS = 200
RIDGE = 0.01  # on the weights, against separable samples


class Misalignment(NamedTuple):
    """A logistic model that turns a pair's evidence into a probability; all float64."""

    centre: Tensor  # [E] median of the real pairs' evidence
    spread: Tensor  # [E] half the range between the 1st and the 99th percentile
    weights: Tensor  # [E + 1], the last is the intercept: log-odds of a pair in the corpus
    share: Tensor  # [] of the corpus that is misaligned, estimated

    def probability(self, evidence: Tensor) -> Tensor:
        """[N] in (0, 1), that each pair is misaligned, from its evidence [N, E]."""
        return _log_odds(self.standardise(evidence), self.weights).sigmoid()

    def standardise(self, evidence: Tensor) -> Tensor:
        """Evidence [N, E] around 0 and about 1 wide, float64; beyond that it grows by its logarithm only."""
        return ((evidence.double() - self.centre) / self.spread).asinh()


def evidence(held_out_loss: Tensor, clip_score: Tensor, agreement: Tensor, influence: Tensor) -> Tensor:
    """[N, 3 + T] what tells good pairs from bad: loss, cosine, agreement [N], and influence [T, N] on every target."""
    return torch.cat([held_out_loss[None], clip_score[None], agreement[None], influence]).T


def learn(real: Tensor, planted: Tensor) -> Misalignment:
    """Learn the model from the evidence of real pairs [N, E] and of planted swaps [M, E].

    Raises:
        ValueError: evidence that is not finite.
    """
    if not (real.isfinite().all() and planted.isfinite().all()):
        raise ValueError("evidence is not finite")
    low, centre, high = real.double().quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64), dim=0)
    spread = ((high - low) / 2).where(high > low, 1.0)
    model = Misalignment(centre, spread, torch.zeros(real.shape[1] + 1, dtype=torch.float64), torch.tensor(SHARE).double())
    z, bad = model.standardise(real), model.standardise(planted)
    evidence = torch.cat([bad, z, z])
    label = torch.cat([torch.ones(len(bad) + len(z)), torch.zeros(len(z))]).double()
    probability = model.share.expand(len(z))
    for _ in range(ITERATIONS):
        weight = torch.cat([torch.ones(len(bad), dtype=torch.float64), probability, 1 - probability])
        weights = _logistic_step(evidence, label, weight, model.weights)
        # The regression saw planted swaps too: back to the odds of the corpus.
        count, share = probability.sum(), probability.mean()
        sampled = ((len(bad) + count) / (len(z) - count)).log()
        odds = _log_odds(z, weights) - sampled + (share / (1 - share)).log()
        probability = odds.sigmoid().clamp(1e-9, 1 - 1e-9)
        model = model._replace(weights=weights, share=share)
    shift = (model.share / (1 - model.share)).log() - sampled
    return model._replace(weights=model.weights + shift * torch.eye(len(model.weights), dtype=torch.float64)[-1])


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
