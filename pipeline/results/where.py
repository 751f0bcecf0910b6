"""A condition on several columns, such as `influence_coco > 0 and clip_score > 0.2`.

Python's own parser reads it, and nothing but the nodes that are listed here is understood: names of columns, numbers,
comparisons, `and`, `or`, `not`, parentheses. Nothing is ever evaluated as code.
"""

import ast
import operator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.results.numbers import is_number, read_numbers

LONGEST = 2000  # characters of a condition: Python's parser has to end before its stack does
COMPARISONS: dict[type[ast.cmpop], Any] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class Where:
    """A condition.

    Args:
        text: as a user wrote it.

    Raises:
        UserError: it can't be read. The line says at which character.
    """

    def __init__(self, text: str):
        self.text = " ".join(text.split())
        if len(self.text) > LONGEST:
            raise UserError(f"--where has {len(self.text)} characters: at most {LONGEST} are read")
        try:
            self._tree = ast.parse(self.text, mode="eval").body
            self._names: dict[str, ast.Name] = {}
            self._check(self._tree)
        except SyntaxError as error:
            raise self._wrong(error.offset or len(self.text) + 1, error.msg) from None  # 0: where it ends
        except (ValueError, RecursionError, MemoryError):
            raise UserError("--where can't be read: it is nested too deeply, or has characters that are no text") from None

    @property
    def columns(self) -> list[str]:
        """The columns that it names."""
        return list(self._names)

    def expect_columns(self, schema: pa.Schema) -> None:
        """Raise UserError if the tables lack a column, or one holds no numbers."""
        for name, node in self._names.items():
            if name not in schema.names:
                known = ", ".join(field.name for field in schema if is_number(field))
                raise self._wrong(_place(self.text, node), f"no column {name!r}: there are {known}")
            if not is_number(schema.field(name)):
                raise self._wrong(_place(self.text, node), f"column {name!r} holds {schema.field(name).type}, not numbers")

    def holds(self, part: pa.Table) -> NDArray[np.bool_]:
        """[N] of which pairs it is true. A comparison with NaN or null is false, whichever it is."""
        return self._holds(self._tree, part)

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.BoolOp(values=values):
                for value in values:
                    self._check(value)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._check(operand)
            case ast.Compare(left=left, ops=ops, comparators=others):
                for operand in (left, *others):
                    if isinstance(operand, ast.Name):
                        self._names.setdefault(operand.id, operand)
                    elif (number := _number(operand)) is None:
                        raise self._wrong(_place(self.text, operand), "a column or a number is needed")
                    elif isinstance(number, int) and abs(number) >= 2**64:
                        raise self._wrong(_place(self.text, operand), "an integer has at most 64 bits")
                if unknown := [op for op in ops if type(op) not in COMPARISONS]:
                    said = f"no comparison {type(unknown[0]).__name__!r}: there are <, <=, >, >=, ==, !="
                    raise self._wrong(_place(self.text, node), said)
            case _:
                said = "comparisons of columns and numbers are needed, joined by and, or, not"
                raise self._wrong(_place(self.text, node), said)

    def _holds(self, node: ast.expr, part: pa.Table) -> NDArray[np.bool_]:
        match node:
            case ast.BoolOp(op=word, values=values):
                join = np.logical_and if isinstance(word, ast.And) else np.logical_or
                return join.reduce([self._holds(value, part) for value in values])
            case ast.UnaryOp(operand=operand):
                return ~self._holds(operand, part)
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [_operand(side, part) for side in (left, *others)]
                result = np.ones(len(part), bool)
                for op, a, b in zip(ops, sides[:-1], sides[1:], strict=True):
                    result &= COMPARISONS[type(op)](a.values, b.values) & a.there & b.there
                return result
        raise AssertionError(node)  # `_check` has refused it

    def _wrong(self, place: int, said: str) -> UserError:
        return UserError(f"--where {self.text!r}, character {place}: {said}")


class _Operand(NamedTuple):
    """One side of a comparison."""

    values: Any  # a number, or [N] numbers; fractions in double precision, as a number is written
    there: NDArray[np.bool_] | bool


def _operand(node: ast.expr, part: pa.Table) -> _Operand:
    if isinstance(node, ast.Name):
        numbers = read_numbers(part, node.id)
        fractions = numbers.values.dtype.kind == "f"
        return _Operand(numbers.values.astype(np.float64) if fractions else numbers.values, numbers.there)
    return _Operand(_number(node), True)


def _number(node: ast.expr) -> int | float | None:
    """The number that a node is, with a sign or without; None if it is none."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return sign * node.value
    return None


def _place(text: str, node: ast.expr) -> int:
    """At which character a node begins, the first one is 1. Python counts bytes."""
    return len(text.encode()[: node.col_offset].decode()) + 1
