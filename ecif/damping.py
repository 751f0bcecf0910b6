"""Choose the damping whose predictions agree best with real refits. The damping matters as much as the formula does."""

import math

from torch import Tensor

from ecif.evaluation import linear_datamodeling_score

SOLVED = 0.05  # a direction with a larger relative residual is not solved, and its damping is no candidate


def choose_damping(
    influence: Tensor, removed: Tensor, losses: Tensor, dampings: list[float], residuals: list[float]
) -> tuple[int, list[float]]:
    """The best of a grid of dampings.

    Args:
        influence: [D, G, N] influence of every pair on each of G parts of a target, for D dampings.
        removed: [R, N] bool, the pairs that each refit left out.
        losses: [R, G] losses of the parts after each refit.
        dampings: the D dampings.
        residuals: the largest relative residual of the directions at each damping.

    Returns:
        The position of the best damping in the grid, and the agreement (LDS) of every damping. If no damping is solved, the
        best is the one of the smallest residual. If no refit changed a loss, it is the largest solved one: little was fitted,
        so that little curvature acted.
    """
    lds = [linear_datamodeling_score(scores, removed, losses) for scores in influence]
    solved = [i for i, residual in enumerate(residuals) if residual <= SOLVED]
    known = [i for i in solved if math.isfinite(lds[i])]
    if known:
        return max(known, key=lds.__getitem__), lds
    if solved:
        return max(solved, key=dampings.__getitem__), lds
    return min(range(len(lds)), key=residuals.__getitem__), lds
