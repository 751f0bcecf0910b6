"""Stage `select`: choose the pairs to train on by a column, and write them as a DataComp subset file."""

import io
from collections import Counter, defaultdict
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import UserError
from pipeline.run_folder import tables
from pipeline.run_folder.columns import IDENTITY
from pipeline.run_folder.finished import open_run

SUBSET = np.dtype("u8,u8")  # DataComp: the two halves of a uid


def select(table: pa.Table, by: str, keep: float) -> list[str]:
    """The uids of the best share of the pairs.

    Args:
        table: has `uid` and the column.
        by: the column. The metadata of its field says which end is good; by default high is.
        keep: share of all pairs, 0 to 1. Exactly round(keep * pairs) are kept (half to even). Ties are broken by uid. NaN is
            never kept, so fewer are kept if too few values are numbers.

    Raises:
        UserError: the share is outside 0 to 1, or the column is no score.
    """
    if by in IDENTITY:
        raise UserError(f"column {by!r} says which pair it is, not how good it is")
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep}: a share of the pairs, above 0 and at most 1")
    if not (pa.types.is_floating(table.schema.field(by).type) or pa.types.is_integer(table.schema.field(by).type)):
        raise UserError(f"column {by!r} holds {table.schema.field(by).type}, not numbers to rank by")
    count = round(keep * len(table))
    table = table.filter(pc.invert(pc.or_kleene(pc.is_nan(table[by]), pc.is_null(table[by]))))
    order = "ascending" if tables.good_end(table.schema.field(by)) == "low" else "descending"
    best = table.sort_by([(by, order), ("uid", "ascending")])
    return best["uid"].to_pylist()[:count]


def chosen_filter(run: str, by: str | None, keep: float | None) -> tuple[str, float]:
    """The column to rank by and the share to keep. A None is replaced by what the stage `filter` of the run chose.

    Raises:
        UserError: the run chose no filter, or it has several targets and none is named.
    """
    if by is not None and keep is not None:
        return by, keep
    shares = defaultdict[str, list[float]](list)
    for checkpoint in open_run(run).checkpoints:
        for name, facts in checkpoint.targets.items():
            if "filter" in facts:
                shares[f"filter_{name}"].append(facts["filter"]["keep"])
    filters = {name: fmean(of_checkpoints) for name, of_checkpoints in shares.items()}
    if by is None:
        if not filters:
            raise UserError(f"{run} has no filter of its own (filter: null): give --by and --keep")
        if len(filters) > 1:
            raise UserError(f"the run has a filter for each target: give --by {' or '.join(filters)}")
        (by,) = filters
    if keep is None:
        if by not in filters:
            raise UserError(f"--by {by} needs --keep, the share of the pairs to keep; only filters have a share of their own")
        keep = filters[by]
    return by, keep


def write_subset(url: str, uids: list[str]) -> None:
    """Write a DataComp subset: a sorted `.npy` of u8,u8. A uid that is in it twice is trained on twice as often."""
    halves = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], SUBSET)
    buffer = io.BytesIO()
    np.save(buffer, np.sort(halves, order=["f0", "f1"]))
    storage.write_bytes(url, buffer.getvalue())


def read_subset(url: str) -> Counter[str]:
    """How often each uid is in a DataComp subset.

    Raises:
        UserError: the file does not exist, or is no subset.
    """
    try:
        halves: NDArray[Any] = np.lib.format.read_array(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"no subset {url}") from None
    except ValueError as error:
        raise UserError(f"{url} is no .npy file: {error}") from None
    if halves.dtype != SUBSET:
        raise UserError(f"{url} holds {halves.dtype}, a DataComp subset holds {SUBSET}")
    return Counter(f"{a:016x}{b:016x}" for a, b in halves.tolist())
