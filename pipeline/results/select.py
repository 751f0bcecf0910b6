"""Stage `select`: from columns to the set of pairs to train on, as a DataComp subset file."""

import io
from collections import Counter, defaultdict
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import UserError
from pipeline.run import load_run

SUBSET = np.dtype("u8,u8")  # DataComp: the two halves of a uid
LOW_IS_GOOD = ("held_out_loss", "misalignment")  # every other score: high is good
IDENTITY = ("shard", "index", "key", "uid", "batch", "fold")


def read_scores(run: str, columns: list[str] | None = None) -> pa.Table:
    """The columns of a run's last scores, all shards by name; every column by default.

    Raises:
        UserError: no finished run, or no such column.
    """
    folder = storage.join(run, "scores", load_run(run)["scores"])
    shards = storage.listing(folder, ".parquet")
    known = pq.read_schema(io.BytesIO(storage.read_bytes(shards[0].url))).names
    for column in columns or []:
        if column not in known:
            raise UserError(f"no column {column!r} in {folder}: there are {', '.join(n for n in known if n not in IDENTITY)}")
    return pa.concat_tables([pq.read_table(io.BytesIO(storage.read_bytes(s.url)), columns=columns) for s in shards])


def select(table: pa.Table, by: str, keep: float) -> list[str]:
    """The uids of the best share of the pairs.

    Args:
        table: has `uid` and the column.
        by: the score; whether high or low is good is known from its name.
        keep: share of all pairs, 0 to 1. Exactly round(keep * pairs) are kept (half to even), ties broken by uid. NaN is
            never kept: where that leaves fewer, fewer are kept.

    Raises:
        UserError: a share outside 0 to 1, or a column that is no score.
    """
    if by in IDENTITY:
        raise UserError(f"column {by!r} says which pair it is, not how good it is")
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep}: a share of the pairs, above 0 and at most 1")
    if not (pa.types.is_floating(table.schema.field(by).type) or pa.types.is_integer(table.schema.field(by).type)):
        raise UserError(f"column {by!r} holds {table.schema.field(by).type}, not numbers to rank by")
    count = round(keep * len(table))
    table = table.filter(pc.invert(pc.or_kleene(pc.is_nan(table[by]), pc.is_null(table[by]))))
    order = "ascending" if by in LOW_IS_GOOD else "descending"
    best = table.sort_by([(by, order), ("uid", "ascending")])
    return best["uid"].to_pylist()[:count]


def chosen_filter(run: str, by: str | None, keep: float | None) -> tuple[str, float]:
    """The column to rank by and the share to keep; what the user leaves open is what the run's stage `filter` chose.

    Raises:
        UserError: the run chose nothing, or one of several targets has to be named.
    """
    if by is not None and keep is not None:
        return by, keep
    shares = defaultdict[str, list[float]](list)
    for name, facts in load_run(run)["targets"].items():  # of several checkpoints: NAME, checkpoint 0
        if "filter" in facts:
            shares[f"filter_{name.partition(',')[0]}"].append(facts["filter"]["keep"])
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
    """A DataComp subset: `.npy` of u8,u8, sorted; a uid that is there twice is upsampled."""
    halves = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], SUBSET)
    buffer = io.BytesIO()
    np.save(buffer, np.sort(halves, order=["f0", "f1"]))
    storage.write_bytes(url, buffer.getvalue())


def read_subset(url: str) -> Counter[str]:
    """How often each uid is in a DataComp subset.

    Raises:
        UserError: there is no such file, or it is no subset.
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
