"""The best temperature of a loss: models are compared at it, because a change of confidence leaves every ranking as it is."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

TEMPERATURES = 16.0  # tau stays between 1 / TEMPERATURES and TEMPERATURES; on separable pairs the best tau is infinite


def best_temperature(loss: Callable[[Tensor], Tensor]) -> float:
    """The tau > 0 that minimises a loss which is convex in tau, by Newton's method in log tau, kept within a bracket.

    Args:
        loss: L(tau) of a float64 scalar, twice differentiable.

    Returns:
        The minimiser in [1 / TEMPERATURES, TEMPERATURES]. It is a bound of that bracket if the loss still falls there.
    """
    low, high, log_tau = -math.log(TEMPERATURES), math.log(TEMPERATURES), 0.0
    for _ in range(64):
        x = torch.tensor(log_tau, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(x.exp()), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, x)
        # The slope changes its sign once, from below. Newton's step is taken if it stays in the bracket, bisection otherwise.
        low, high = (low, log_tau) if slope > 0 else (log_tau, high)
        newton = log_tau - slope.item() / curvature.item() if curvature > 0 else math.inf
        last, log_tau = log_tau, newton if low <= newton <= high else (low + high) / 2
        if abs(log_tau - last) < 1e-12:
            break
    return math.exp(log_tau)
