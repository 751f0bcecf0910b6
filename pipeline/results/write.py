"""Write which pairs are selected.

There are two formats. A DataComp subset holds uids, for DataComp's resharder. A table of keys holds shard and key of each pair.
It is exact where uids repeat or are made up. `ecif export` takes both.
"""

import os
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.uids import pack_column, unpack
from pipeline.errors import UserError
from pipeline.results.select import Selected, Shards
from pipeline.results.subset import SUBSET

KEYS = pa.schema([("shard", pa.string()), ("index", pa.int32()), ("key", pa.string()), ("uid", pa.string())])
ROW_GROUP = 100_000  # the fewest rows of a table of keys that are written at once
PAIR = np.dtype([("uid", "S16"), ("copies", ">u4")])  # its bytes are sorted as uids are
SORTED_AT_ONCE = 1 << 20  # pairs


class _Written(NamedTuple):
    """What was found while a subset was written."""

    entries: int  # uids, each as often as its pairs are trained on
    unlike: int  # uids of pairs of which one is kept more often than another
    example: NDArray[np.bytes_]  # of these, at most one
    most: int  # the most copies of a pair


def write_subset(url: str, shards: Shards, selected: Selected, unique: bool = False) -> int:
    """Write the uids of the kept pairs as a DataComp subset, each as often as its pairs are trained on.

    It is a sorted `.npy` of u8,u8. Uids are sorted on disk: runs of SORTED_AT_ONCE pairs are merged. That takes 20 bytes of
    scratch a pair, and 16 for each entry of the subset.

    Args:
        url: of the file.
        shards: gives the column `uid`.
        selected: how often each pair is trained on.
        unique: whether no two pairs have one uid. Those that are not kept need not be looked at then.

    Returns:
        The number of entries.

    Raises:
        UserError: a uid belongs to pairs of which one is kept more often than another, which such a file can't say.
        RunError: the columns have changed since the pairs were selected.
    """
    with tempfile.TemporaryDirectory(prefix="ecif-") as scratch:
        runs = _sorted_runs(_pairs(shards, selected, unique), scratch)
        path = os.path.join(scratch, "subset.npy")
        with open(path, "wb") as file:
            _write_header(file, 0)
            found = _merge(runs, file)
            file.seek(0)
            _write_header(file, found.entries)
        if found.unlike:
            how = "drawn more often than others" if found.most > 1 else "kept and to pairs that are not"
            raise UserError(
                f"{found.unlike} uids belong to pairs that are {how}, such as {unpack(found.example)[0]}: a DataComp subset "
                "can't say which is meant; --format keys can"
            )
        storage.upload(path, url)
    return found.entries


def write_keys(url: str, shards: Shards, selected: Selected) -> None:
    """Write shard, index, key and uid of the kept pairs as Parquet, a row for each time that a pair is trained on.

    Raises:
        RunError: the columns have changed since the pairs were selected.
    """
    with tempfile.TemporaryDirectory(prefix="ecif-") as scratch:
        path = os.path.join(scratch, "keys.parquet")
        with pq.ParquetWriter(path, KEYS, compression="zstd") as file:
            waiting = KEYS.empty_table()
            for part, copies in selected.beside(shards(KEYS.names)):
                rows = np.repeat(np.arange(len(part)), copies)
                waiting = pa.concat_tables([waiting, part.take(rows).cast(KEYS)])
                if len(waiting) >= ROW_GROUP:
                    file.write_table(waiting.combine_chunks())
                    waiting = KEYS.empty_table()
            file.write_table(waiting.combine_chunks())
        storage.upload(path, url)


def _pairs(shards: Shards, selected: Selected, unique: bool) -> Iterator[NDArray[np.void]]:
    """Of each shard, [n] uid and copies of its pairs."""
    for part, copies in selected.beside(shards(["uid"])):
        pairs = np.empty(len(part), PAIR)
        pairs["uid"], pairs["copies"] = pack_column(part["uid"]), copies
        yield pairs[copies > 0] if unique else pairs


def _sorted_runs(parts: Iterator[NDArray[np.void]], scratch: str) -> list["np.memmap[Any, np.dtype[np.void]]"]:
    """Pairs of all parts as sorted arrays that are mapped from files."""
    runs: list[np.memmap[Any, np.dtype[np.void]]] = []
    waiting, count, more = [np.empty(0, PAIR)], 0, True
    while more:
        part = next(parts, None)
        more = part is not None
        if part is not None:
            waiting.append(part)
            count += len(part)
        if count >= SORTED_AT_ONCE or (count and not more):
            pairs = np.concatenate(waiting, dtype=PAIR)  # which would make its integers native
            pairs.view(f"S{PAIR.itemsize}").sort()
            path = os.path.join(scratch, f"run{len(runs)}")
            pairs.tofile(path)
            runs.append(np.memmap(path, PAIR, "r"))
            waiting, count = [], 0
    return runs


def _merge(runs: list["np.memmap[Any, np.dtype[np.void]]"], file: BinaryIO) -> _Written:
    """Append the halves of all uids in their order, each as often as its pairs are trained on."""
    entries = unlike = most = 0
    example = np.empty(0, "S16")
    for pairs in _in_order(runs):
        uids, copies = pairs["uid"], pairs["copies"].astype(np.int64)
        again = uids[1:] == uids[:-1]
        differ = np.unique(uids[1:][again & (copies[1:] != copies[:-1])])
        unlike, most = unlike + len(differ), max(most, int(copies.max(initial=0)))
        example = example if len(example) else differ[:1]
        first = np.concatenate([[True], ~again])[: len(uids)]
        repeated = np.repeat(uids[first], copies[first])
        repeated.view(">u8").astype("u8").tofile(file)
        entries += len(repeated)
    return _Written(entries, unlike, example, most)


def _in_order(runs: list["np.memmap[Any, np.dtype[np.void]]"]) -> Iterator[NDArray[np.void]]:
    """All pairs of sorted runs in the order of their uids, in chunks. Pairs with one uid are in one chunk.

    A run is mapped to be searched, and read to be merged: what is read leaves memory again.
    """
    step = max(1, SORTED_AT_ONCE // max(1, len(runs)))
    ends = np.sort(np.concatenate([np.empty(0, "S16"), *(run["uid"][step - 1 :: step] for run in runs)]))[:: max(1, len(runs))]
    starts = [0] * len(runs)
    for end in [*np.unique(ends), None]:
        stops = [len(run) if end is None else int(np.searchsorted(run["uid"], end, "right")) for run in runs]
        places = zip(runs, starts, stops, strict=True)
        read = [np.fromfile(str(run.filename), PAIR, b - a, offset=a * PAIR.itemsize) for run, a, b in places]
        chunk = np.concatenate([np.empty(0, PAIR), *read], dtype=PAIR)
        chunk.view(f"S{PAIR.itemsize}").sort(kind="stable")  # which merges what is sorted
        yield chunk
        starts = stops


def _write_header(file: BinaryIO, entries: int) -> None:
    """The header of a `.npy`. It is as long for any number of entries: numpy leaves room for it."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(SUBSET), "fortran_order": False, "shape": (entries,)}
    )
