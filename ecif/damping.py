"""Choose the damping whose predictions agree best with real refits. The damping matters as much as the formula does."""

import math

from torch import Tensor

from ecif.evaluation import linear_datamodeling_score


def choose_damping(influence: Tensor, removed: Tensor, losses: Tensor) -> tuple[int, list[float]]:
    """The best of a grid of dampings.

    Args:
        influence: [D, G, N] influence of every pair on each of G parts of a target, for D dampings.
        removed: [R, N] bool, the pairs that each refit left out.
        losses: [R, G] losses of the parts after each refit.

    Returns:
        The position of the best damping in the grid, and the agreement (LDS) of every damping.
    """
    lds = [linear_datamodeling_score(scores, removed, losses) for scores in influence]
    return max(range(len(lds)), key=lambda i: lds[i] if math.isfinite(lds[i]) else -math.inf), lds
