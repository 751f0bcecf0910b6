"""A condition holds of the rows that a plain loop says, and a mistake in it is one line with its place."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.results.where import Where

FIELDS = [("a", pa.float32()), ("b", pa.float64()), ("n", pa.int64()), ("uid", pa.string())]
SCHEMA = pa.schema(FIELDS)
VALUES = st.one_of(st.none(), st.sampled_from([0, 1, -1, 2]))
FRACTIONS = st.one_of(VALUES, st.sampled_from([math.nan, math.inf, 0.5, np.float32(0.2).item()]))
OPERAND = st.sampled_from(["a", "b", "n", "0", "1", "-1", "0.2", "5e-1", "1e999"])
COMPARISON = st.builds(
    lambda first, more: " ".join([first, *(f"{op} {other}" for op, other in more)]),
    OPERAND,
    st.lists(st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), OPERAND), min_size=1, max_size=2),
)
CONDITION = st.recursive(
    COMPARISON,
    lambda inner: st.one_of(
        st.builds(lambda x: f"not ({x})", inner),
        st.builds(
            lambda op, xs: f" {op} ".join(f"({x})" for x in xs), st.sampled_from(["and", "or"]), st.lists(inner, min_size=2)
        ),
    ),
    max_leaves=4,
)


class Number(float):
    """A number as the rule has it: every comparison with a missing one is false, `!=` too."""

    def _both(self, other: float, result: bool) -> bool:
        return result and not math.isnan(self) and not math.isnan(other)

    def __lt__(self, other):
        return self._both(other, float(self) < float(other))

    def __le__(self, other):
        return self._both(other, float(self) <= float(other))

    def __gt__(self, other):
        return self._both(other, float(self) > float(other))

    def __ge__(self, other):
        return self._both(other, float(self) >= float(other))

    def __eq__(self, other):
        return self._both(other, float(self) == float(other))

    def __ne__(self, other):
        return self._both(other, float(self) != float(other))

    __hash__ = float.__hash__


@given(rows=st.lists(st.tuples(FRACTIONS, FRACTIONS, VALUES), min_size=1, max_size=6), condition=CONDITION)
@settings(deadline=None, max_examples=300)
def test_it_holds_of_the_rows_that_python_says(rows, condition):
    columns = [pa.array(values, kind) for values, (_, kind) in zip(zip(*rows, strict=True), FIELDS[:3], strict=True)]
    part = pa.table(columns, names=["a", "b", "n"])
    truth = [
        bool(eval(condition, {"__builtins__": {}}, {name: Number(math.nan if v is None else v) for name, v in row.items()}))
        for row in part.to_pylist()
    ]
    assert Where(condition).holds(part).tolist() == truth


def test_nan_and_null_are_on_neither_side():
    part = pa.table({"a": pa.array([math.nan, None, 1.0], pa.float32())})
    for condition in ("a > 0", "a <= 0", "a == a", "a != 5", "0 < a < 2"):
        assert Where(condition).holds(part).tolist()[:2] == [False, False]
    assert Where("not a > 0").holds(part).tolist() == [True, True, False]


def test_large_integers_are_compared_exactly():
    part = pa.table({"n": [2**53, 2**53 + 1]})
    assert Where(f"n > {2**53}").holds(part).tolist() == [False, True]
    assert Where(f"n < {2**63}").holds(part).tolist() == [True, True]


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("a > 0 and", 10, "invalid syntax"),
        ("a > 0 & b > 0", 5, "a column or a number is needed"),
        ("a >", 4, "invalid syntax"),
        ("(a > 0", 1, "'(' was never closed"),
        ("", 1, "invalid syntax"),
        ("a = 1", 3, "invalid syntax"),
        ("a > 0; b > 0", 6, "invalid syntax"),
        ("a", 1, "comparisons of columns and numbers are needed"),
        ("a > 0 and b", 11, "comparisons of columns and numbers are needed"),
        ("not a", 5, "comparisons of columns and numbers are needed"),
        ("a in (1, 2)", 6, "a column or a number is needed"),
        ("a is b", 1, "no comparison 'Is'"),
        (f"a > {2**64}", 5, "an integer has at most 64 bits"),
        ("a > 'x'", 5, "a column or a number is needed"),
        ("a > True", 5, "a column or a number is needed"),
        ("a + 1 > 0", 1, "a column or a number is needed"),
        ("a.real > 0", 1, "a column or a number is needed"),
        ("a[0] > 0", 1, "a column or a number is needed"),
        ("0 < abs(a)", 5, "a column or a number is needed"),
        ("__import__('os').system('true')", 1, "comparisons of columns and numbers are needed"),
        ("(lambda: 1)() > 0", 1, "a column or a number is needed"),
        ("a > 0 if b > 0 else n > 0", 1, "comparisons of columns and numbers are needed"),
        ("é > 0 and ß(a) > 0", 11, "a column or a number is needed"),
    ],
)
def test_what_is_no_condition_is_said_with_its_place(text, place, said):
    with pytest.raises(UserError) as error:
        Where(text)
    assert f"character {place}: " in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["a > \0", "not " * 400 + "a > 0", "(" * 900 + "a > 0" + ")" * 900, "-" * 1900 + "1 > a", "a > 0 " * 999]
)
def test_what_would_break_the_parser_is_one_line(text):
    with pytest.raises(UserError) as error:
        Where(text).holds(pa.table({"a": [1.0]}))
        raise UserError("--where is read")
    assert str(error.value).startswith("--where")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a > 0 and clip > 0", r"character 11: no column 'clip': there are a, b, n$"),
        ("a > 0 or uid > 3", r"character 10: column 'uid' holds string, not numbers$"),
    ],
)
def test_a_column_that_can_not_be_compared(text, said):
    with pytest.raises(UserError, match=said):
        Where(text).expect_columns(SCHEMA)
    Where("a > 0 and b > a or n == 3").expect_columns(SCHEMA)
