import pytest

from ecif.search import bisect, minimise


@pytest.mark.parametrize("threshold", [-2.0, -0.3, 0.0, 1.7, 2.999])
def test_the_bracket_holds_the_threshold_and_has_the_stated_width(threshold):
    low, high = bisect(lambda x: x > threshold, -2.0, 3.0, 20)
    assert low <= threshold <= high
    assert high - low == pytest.approx(5 / 2**20, rel=1e-9)


def test_a_threshold_outside_the_bracket_ends_at_the_nearest_end():
    assert bisect(lambda x: x > 7, -2.0, 3.0, 20)[1] == 3.0
    assert bisect(lambda x: x > -7, -2.0, 3.0, 20)[0] == -2.0


def test_each_halving_asks_once():
    asked = []
    bisect(lambda x: bool(asked.append(x)), 0.0, 8.0, 3)
    assert asked == [4.0, 6.0, 7.0]


@pytest.mark.parametrize("place", [-1.9, 0.0, 0.3, 2.99])
def test_the_minimum_is_found_in_a_valley_of_the_grid(place):
    assert minimise(lambda x: abs(x - place) ** 1.5, -2.0, 3.0, 11, 30) == pytest.approx(place, abs=1e-6)


def test_of_two_valleys_the_deeper_one_is_taken():
    assert minimise(lambda x: min((x - 1) ** 2, (x + 1) ** 2 - 0.1), -2.0, 2.0, 9, 30) == pytest.approx(-1, abs=1e-6)
