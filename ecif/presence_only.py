"""Presence-only logistic regression: bad examples are known, and the others are a mixture of good and bad ones.

    log p_bad(z) / p_good(z) = w . z + c,      p_others = (1 - share) p_good + share p_bad

Expectation maximisation (Ward, Hastie et al., Biometrics 2009), which SQUAREM (Varadhan & Roland, Scand. J. Stat. 2008) speeds
up: two steps, and a leap along their line. Weights are those of the log-odds of being bad among the others,
w . z + c + log share / (1 - share). The last one is the intercept. All numbers are float64.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ecif.evaluation import auroc

SHARE = 0.2  # the share at the start of the iteration
CYCLES = 100  # of two steps and a leap, at most
LEAP = 64.0  # the largest factor of a leap
FAR = 5.0  # in log-odds: a leap that goes farther is not taken, and a step that does is cut short
CONVERGED = 1e-6  # change of the share in a cycle at which the iteration ends
RIDGE = 0.01  # on the weights; without it they would grow without limit on a separable sample


class Fit(NamedTuple):
    """Weights of the log-odds, and the share that they were found with."""

    weights: Tensor
    share: Tensor


def start(z: Tensor) -> Tensor:
    """Weights that know nothing but SHARE."""
    weights = torch.zeros(z.shape[1] + 1, dtype=torch.float64)
    weights[-1] = math.log(SHARE / (1 - SHARE))
    return weights


def maximise(z: Tensor, bad: Tensor, weights: Tensor) -> Fit:
    """The maximum of the likelihood from some weights on, for the others z [N, E] and bad examples [M, E]."""
    evidence = torch.nn.functional.pad(torch.cat([bad, z, z]), (0, 1), value=1.0)
    label = torch.cat([torch.ones(len(bad) + len(z)), torch.zeros(len(z))]).double()

    def step(weights: Tensor) -> Fit:
        """One expectation and maximisation."""
        probability = log_odds(z, weights).sigmoid().clamp(1e-9, 1 - 1e-9)
        weight = torch.cat([torch.ones(len(bad), dtype=torch.float64), probability, 1 - probability])
        count, share = probability.sum(), probability.mean()
        # The regression's sample also holds the bad examples, so its odds are converted to those among the others.
        shift = torch.zeros_like(weights)
        shift[-1] = (share / (1 - share)).log() - ((len(bad) + count) / (len(z) - count)).log()
        return Fit(_logistic_step(evidence, label, weight, weights - shift) + shift, share)

    before = -1.0
    for _ in range(CYCLES):
        first = step(weights).weights
        second = step(first).weights
        moved, bent = first - weights, second - 2 * first + weights
        factor = (moved.norm() / bent.norm().clamp(min=torch.finfo(torch.float64).tiny)).clamp(1.0, LEAP)
        leap = weights + 2 * factor * moved + factor.square() * bent
        found = step(leap if (leap - second).abs().max() < FAR else second)
        weights = found.weights
        if abs(found.share.item() - before) < CONVERGED:
            break
        before = found.share.item()
    return found


def separation(z: Tensor, bad: Tensor, fit: Fit) -> float:
    """AUROC of bad examples [M, E] against the good ones among the others z [N, E], whose share is taken as fitted."""
    is_bad = torch.arange(len(bad) + len(z)) < len(bad)
    against_all = auroc(torch.cat([log_odds(bad, fit.weights), log_odds(z, fit.weights)]), is_bad)
    share = fit.share.item()
    return (against_all - share / 2) / (1 - share)  # bad against bad is at 1/2


def log_odds(z: Tensor, weights: Tensor) -> Tensor:
    """[N] of being bad."""
    return z @ weights[:-1] + weights[-1]


def _logistic_step(z1: Tensor, label: Tensor, weight: Tensor, weights: Tensor) -> Tensor:
    """One Newton step of weighted logistic regression with a ridge; the last column of z1 is 1."""
    ridge = torch.full_like(weights, RIDGE)
    ridge[-1] = 0.0
    p = (z1 @ weights).sigmoid()
    gradient = z1.T @ (weight * (p - label)) + ridge * weights
    hessian = (z1 * (weight * p * (1 - p))[:, None]).T @ z1 + torch.diag(ridge)
    step = torch.linalg.solve(hessian, gradient)
    return weights - step * (FAR / step.abs().max().clamp(min=FAR))
