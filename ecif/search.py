"""Searches along one line: bisection for a threshold, golden sections for a minimum."""

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


def minimise(value: Callable[[float], float], low: float, high: float, steps: int, sections: int) -> float:
    """The minimiser of a function of one number: the best of a grid, refined by golden sections between its neighbours.

    Args:
        value: the function.
        low: lower end of the interval.
        high: upper end.
        steps: points of the grid, both ends included.
        sections: golden sections; each shortens the bracket to 0.62 of its length.
    """
    grid = [low + (high - low) * i / (steps - 1) for i in range(steps)]
    best = min(range(steps), key=[value(x) for x in grid].__getitem__)
    low, high = grid[max(0, best - 1)], grid[min(steps - 1, best + 1)]
    share = (5**0.5 - 1) / 2
    a, b = high - share * (high - low), low + share * (high - low)
    at_a, at_b = value(a), value(b)
    for _ in range(sections):
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - share * (high - low)
            at_a = value(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + share * (high - low)
            at_b = value(b)
    return (low + high) / 2
