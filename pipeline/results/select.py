"""Stage `select`: choose the pairs to train on by a column, and write which they are.

There are two formats. A DataComp subset holds uids, for DataComp's resharder. A table of keys holds shard and key of each pair.
It is exact where uids repeat or are made up. `ecif export` takes both.
"""

import io
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.uids import pack, unpack
from pipeline.errors import RunError, UserError
from pipeline.run_folder import tables
from pipeline.run_folder.columns import IDENTITY
from pipeline.run_folder.finished import Finished, open_run

SUBSET = np.dtype("u8,u8")  # DataComp: the two halves of a uid
KEYS = pa.schema([("shard", pa.string()), ("index", pa.int32()), ("key", pa.string()), ("uid", pa.string())])
ROW_GROUP = 100_000  # the fewest rows of a table of keys that are written at once


class Selected(NamedTuple):
    """N pairs, shard after shard, and how often each of them is to be trained on."""

    uid: NDArray[np.bytes_]  # [N] packed
    copies: NDArray[np.int32]  # [N]; 0 drops a pair

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[N] whether a pair is kept."""
        return self.copies > 0

    @property
    def uids(self) -> NDArray[np.bytes_]:
        """The packed uids of the kept pairs, in the order of the pairs, each as often as its pair is trained on."""
        return np.repeat(self.uid, self.copies)


class Column(NamedTuple):
    """A column of N pairs, shard after shard."""

    uid: NDArray[np.bytes_]  # [N] packed
    rows: NDArray[np.int64]  # [n] the pairs that have a number
    values: NDArray[Any]  # [n] their numbers
    low_is_good: bool


def select(parts: Iterable[pa.Table], by: str, keep: float) -> Selected:
    """Keep the best share of the pairs.

    Args:
        parts: tables with `uid` and the column.
        by: the column. The metadata of its field says which end is good; by default high is.
        keep: share of all pairs, 0 to 1. Exactly round(keep * pairs) are kept (half to even). Ties are broken by uid, and where
            uids repeat, by the order of the pairs. NaN is never kept, so fewer are kept if too few values are numbers.

    Raises:
        UserError: the share is outside 0 to 1, or the column is no score.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep}: a share of the pairs, above 0 and at most 1")
    uid, rows, value, low = read_column(parts, by)
    copies = np.zeros(len(uid), np.int32)
    count = min(round(keep * len(uid)), len(rows))
    if count:
        worst = count - 1 if low else len(rows) - count  # where the worst kept value is in the sorted values
        edge = np.partition(value, worst)[worst]
        copies[rows[value < edge if low else value > edge]] = 1
        ties = rows[value == edge]
        copies[ties[np.argsort(uid[ties], kind="stable")[: count - copies.sum()]]] = 1
    return Selected(uid, copies)


def read_column(parts: Iterable[pa.Table], by: str) -> Column:
    """A column that pairs can be ranked by.

    Args:
        parts: tables with `uid` and the column.
        by: the column.

    Raises:
        UserError: the column is no score.
    """
    if by in IDENTITY:
        raise UserError(f"column {by!r} says which pair it is, not how good it is")
    uids, scored, values, field = [], [], [], None
    for part in parts:
        field = part.schema.field(by)
        if not (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
            raise UserError(f"column {by!r} holds {field.type}, not numbers to rank by")
        number = pc.invert(pc.or_kleene(pc.is_nan(part[by]), pc.is_null(part[by]))).to_numpy()
        uids.append(pack(part["uid"].to_pylist()))
        scored.append(number)
        values.append(part[by].filter(pa.array(number)).to_numpy())
    low = field is not None and tables.good_end(field) == "low"
    return Column(np.concatenate(uids), np.flatnonzero(np.concatenate(scored)), np.concatenate(values), low)


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


def unambiguous_uids(selected: Selected) -> NDArray[np.bytes_]:
    """The packed uids of the kept pairs, sorted, each as often as its pairs are trained on: what a DataComp subset can say.

    Raises:
        UserError: a uid belongs to pairs of which one is kept more often than another.
    """
    order = np.argsort(selected.uid, kind="stable")
    uids, copies = selected.uid[order], selected.copies[order]
    again = uids[1:] == uids[:-1]
    unlike = uids[1:][again & (copies[1:] != copies[:-1])]
    if len(unlike):
        how = "drawn more often than others" if copies.max() > 1 else "kept and to pairs that are not"
        raise UserError(
            f"{len(np.unique(unlike))} uids belong to pairs that are {how}, such as "
            f"{unpack(unlike[:1])[0]}: a DataComp subset can't say which is meant; --format keys can"
        )
    first = np.concatenate([[True], ~again])[: len(uids)]
    return np.repeat(uids[first], copies[first])


def write_subset(url: str, uids: NDArray[np.bytes_]) -> None:
    """Write packed uids as a DataComp subset: a sorted `.npy` of u8,u8. What is in it twice is trained on twice as often."""
    halves = np.sort(uids).view(">u8").astype("u8").view(SUBSET)
    buffer = io.BytesIO()
    np.save(buffer, halves)
    storage.write_bytes(url, buffer.getvalue())


def write_keys(url: str, run: Finished, selected: Selected) -> None:
    """Write shard, index, key and uid of the kept pairs as Parquet, a row for each time that a pair is trained on.

    Raises:
        RunError: the run's columns have changed since the pairs were selected.
    """
    with tempfile.TemporaryDirectory(prefix="ecif-") as scratch:
        path = os.path.join(scratch, "keys.parquet")
        with pq.ParquetWriter(path, KEYS, compression="zstd") as file:
            start, waiting = 0, KEYS.empty_table()
            for _, part in run.of_shards(KEYS.names):
                copies = selected.copies[start : start + len(part)]
                start += len(part)
                if len(copies) == len(part):
                    rows = np.repeat(np.arange(len(part)), copies)
                    waiting = pa.concat_tables([waiting, part.take(rows).cast(KEYS)])
                if len(waiting) >= ROW_GROUP:
                    file.write_table(waiting.combine_chunks())
                    waiting = KEYS.empty_table()
            file.write_table(waiting.combine_chunks())
        if start != len(selected.copies):
            raise RunError(f"{run.table}: its columns have changed meanwhile: select again")
        storage.upload(path, url)
