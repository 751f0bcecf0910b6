"""The numbers of a column: which pairs have one, and how the pairs are ordered by them."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.run_folder import tables


class Numbers(NamedTuple):
    """A column of N pairs."""

    values: NDArray[Any]  # [N] integers or fractions; 0 where a pair has no number
    there: NDArray[np.bool_]  # [N] whether a pair has one: null and NaN are none
    low_is_good: bool

    def ranks(self) -> NDArray[Any]:
        """[N] unsigned integers as wide as the values and in their order, the best first. Equal values have equal ones."""
        unsigned = np.dtype(f"u{self.values.itemsize}").type
        sign = unsigned(1 << (8 * self.values.itemsize - 1))
        if self.values.dtype.kind == "f":
            bits = (self.values + self.values.dtype.type(0)).view(unsigned)  # -0.0 + 0.0 is 0.0
            bits = np.where(bits & sign, ~bits, bits | sign)
        else:
            bits = self.values.view(unsigned) ^ (sign if self.values.dtype.kind == "i" else unsigned(0))
        return bits if self.low_is_good else ~bits


def is_number(field: pa.Field) -> bool:
    """Whether a column holds integers or fractions."""
    return pa.types.is_floating(field.type) or pa.types.is_integer(field.type)


def read_numbers(part: pa.Table, column: str) -> Numbers:
    """The numbers of a column.

    Raises:
        UserError: it holds no numbers.
    """
    field, values = part.schema.field(column), part[column]
    if not is_number(field):
        raise UserError(f"column {column!r} holds {field.type}, not numbers to rank by")
    there = pc.invert(pc.or_kleene(pc.is_nan(values), pc.is_null(values))).to_numpy()
    filled = pc.if_else(pa.array(there), values, pa.scalar(0, field.type)).to_numpy()
    return Numbers(filled, there, tables.good_end(field) == "low")
