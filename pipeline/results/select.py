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
from typing import NamedTuple

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
    """N pairs, shard after shard, and which of them are kept."""

    uid: NDArray[np.bytes_]  # [N] packed
    kept: NDArray[np.bool_]  # [N]

    @property
    def uids(self) -> NDArray[np.bytes_]:
        """The packed uids of the kept pairs, in the order of the pairs."""
        return self.uid[self.kept]


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
    if by in IDENTITY:
        raise UserError(f"column {by!r} says which pair it is, not how good it is")
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep}: a share of the pairs, above 0 and at most 1")
    uids, scored, values, field = [], [], [], None
    for part in parts:
        field = part.schema.field(by)
        if not (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
            raise UserError(f"column {by!r} holds {field.type}, not numbers to rank by")
        number = pc.invert(pc.or_kleene(pc.is_nan(part[by]), pc.is_null(part[by]))).to_numpy()
        uids.append(pack(part["uid"].to_pylist()))
        scored.append(number)
        values.append(part[by].filter(pa.array(number)).to_numpy())
    uid, rows, value = np.concatenate(uids), np.flatnonzero(np.concatenate(scored)), np.concatenate(values)
    kept = np.zeros(len(uid), bool)
    count = min(round(keep * len(uid)), len(rows))
    if count:
        low = tables.good_end(field) == "low"
        worst = count - 1 if low else len(rows) - count  # where the worst kept value is in the sorted values
        edge = np.partition(value, worst)[worst]
        kept[rows[value < edge if low else value > edge]] = True
        ties = rows[value == edge]
        kept[ties[np.argsort(uid[ties], kind="stable")[: count - kept.sum()]]] = True
    return Selected(uid, kept)


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
    """The packed uids of the kept pairs, each once, sorted: what a DataComp subset can say.

    Raises:
        UserError: a uid belongs to a pair that is kept and to one that is not.
    """
    uids, dropped = np.unique(selected.uids), selected.uid[~selected.kept]
    dropped.sort()  # or looking them up takes three times as long
    if len(uids):
        both = uids[np.searchsorted(uids, dropped).clip(max=len(uids) - 1)] == dropped
        if both.any():
            raise UserError(
                f"{len(np.unique(dropped[both]))} uids belong to pairs that are kept and to pairs that are not, such as "
                f"{unpack(dropped[both][:1])[0]}: a DataComp subset can't say which is meant; --format keys can"
            )
    return uids


def write_subset(url: str, uids: NDArray[np.bytes_]) -> None:
    """Write packed uids as a DataComp subset: a sorted `.npy` of u8,u8. What is in it twice is trained on twice as often."""
    halves = np.sort(uids).view(">u8").astype("u8").view(SUBSET)
    buffer = io.BytesIO()
    np.save(buffer, halves)
    storage.write_bytes(url, buffer.getvalue())


def write_keys(url: str, run: Finished, selected: Selected) -> None:
    """Write shard, index, key and uid of the kept pairs as Parquet.

    Raises:
        RunError: the run's columns have changed since the pairs were selected.
    """
    with tempfile.TemporaryDirectory(prefix="ecif-") as scratch:
        path = os.path.join(scratch, "keys.parquet")
        with pq.ParquetWriter(path, KEYS, compression="zstd") as file:
            start, waiting = 0, KEYS.empty_table()
            for _, part in run.of_shards(KEYS.names):
                kept = selected.kept[start : start + len(part)]
                start += len(part)
                if len(kept) == len(part):
                    waiting = pa.concat_tables([waiting, part.filter(pa.array(kept)).cast(KEYS)])
                if len(waiting) >= ROW_GROUP:
                    file.write_table(waiting.combine_chunks())
                    waiting = KEYS.empty_table()
            file.write_table(waiting.combine_chunks())
        if start != len(selected.kept):
            raise RunError(f"{run.table}: its columns have changed meanwhile: select again")
        storage.upload(path, url)
