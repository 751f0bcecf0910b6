"""Bisection on a yes-or-no question: the halvings that the fitted logit bias and the sharpness of `agreement` share."""

from collections.abc import Callable


def bisect(is_above: Callable[[float], bool], low: float, high: float, halvings: int) -> tuple[float, float]:
    """Narrow the bracket of a threshold.

    Args:
        is_above: whether a point lies above the threshold; it is asked for the middle of the bracket only.
        low: where the bracket starts; taken to lie below the threshold.
        high: where it ends; taken to lie above.
        halvings: how often the bracket is halved.

    Returns:
        The last bracket (low, high), of width 2^-halvings times the first. Where the threshold lies outside the first bracket,
        the last one touches the end that is nearest to it.
    """
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return low, high
