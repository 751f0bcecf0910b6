"""Bisection, with which the fit finds the logit bias and `agreement` its sharpness."""

from collections.abc import Callable


def bisect(is_above: Callable[[float], bool], low: float, high: float, halvings: int) -> tuple[float, float]:
    """Narrow the bracket of a threshold.

    Args:
        is_above: whether a point lies above the threshold. It is called with the middle of the bracket only.
        low: lower end of the bracket, assumed to lie below the threshold.
        high: upper end of the bracket, assumed to lie above the threshold.
        halvings: number of halvings.

    Returns:
        The last bracket (low, high), of width 2^-halvings times the first. If the threshold lies outside the first bracket, the
        last bracket is at the end that is nearest to it.
    """
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return low, high
