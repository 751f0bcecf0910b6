"""Read which pairs a subset holds, and find them in the columns of a run, shard by shard."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.uids import pack_column
from pipeline.errors import UserError

SUBSET = np.dtype("u8,u8")  # DataComp: the two halves of a uid
PARQUET = b"PAR1"  # first bytes
CHUNK = 1 << 20  # entries of a subset that are looked at together
Places = NDArray[np.int64]


class Subset(ABC):
    """The pairs that a file holds, each as often as it is to be trained on."""

    @abstractmethod
    def copies(self, shard: str, pairs: pa.Table) -> NDArray[np.int64]:
        """[N] how often each pair of a shard is in the subset. To be asked once of every shard.

        Args:
            shard: its name.
            pairs: index, key and uid of its pairs.
        """

    @abstractmethod
    def missing(self) -> tuple[int, str]:
        """How many entries were in no shard so far, and an example."""

    @abstractmethod
    def __len__(self) -> int: ...

    def ambiguous(self) -> tuple[int, str]:
        """How many uids were found to belong to several pairs, and an example."""
        return 0, ""


class Uids(Subset):
    """A DataComp subset. A uid stands for every pair that has it, as in DataComp's resharder.

    Args:
        halves: of the uids, sorted; u8,u8. They may be mapped from a file: they are searched, not read. A byte of memory an
            entry counts the pairs that have it.
    """

    def __init__(self, halves: NDArray[np.void]):
        self.halves = halves
        self.pairs = np.zeros(len(halves), np.uint8)  # that have the uid: 0, 1, 2 for more; counted at its first entry

    def __len__(self) -> int:
        return len(self.halves)

    def copies(self, shard: str, pairs: pa.Table) -> NDArray[np.int64]:
        """See `Subset`."""
        high, low = pack_column(pairs["uid"]).view(">u8").reshape(-1, 2).astype("u8").T
        start, stop = (np.searchsorted(self.halves["f0"], high, side) for side in ("left", "right"))
        start, stop = self._bisect(start, stop, low, "left"), self._bisect(start, stop, low, "right")
        entries, counts = np.unique(start[start < stop], return_counts=True)
        self.pairs[entries] = np.minimum(self.pairs[entries] + counts, 2)
        return stop - start

    def missing(self) -> tuple[int, str]:
        """See `Subset`."""
        return self._uids_with(0)

    def ambiguous(self) -> tuple[int, str]:
        """See `Subset`."""
        return self._uids_with(2)

    def _bisect(self, start: Places, stop: Places, low: NDArray[np.uint64], side: str) -> Places:
        """[N] where a low half is among those from `start` to `stop`, whose high halves are the same."""
        before = np.less if side == "left" else np.less_equal
        while (searched := start < stop).any():
            middle = (start + stop) // 2
            after = searched & before(self.halves["f1"][np.where(searched, middle, 0)], low)
            start, stop = np.where(after, middle + 1, start), np.where(searched & ~after, middle, stop)
        return start

    def _uids_with(self, pairs: int) -> tuple[int, str]:
        """How many uids have so many pairs, and the first of them."""
        count, example, before = 0, "", np.empty(0, SUBSET)
        for rows in (slice(start, start + CHUNK) for start in range(0, len(self), CHUNK)):
            halves = self.halves[rows]
            first = np.concatenate([[not len(before) or before[-1] != halves[0]], halves[1:] != halves[:-1]])
            there = halves[first & (self.pairs[rows] == pairs)]
            example = example or "".join(f"{half:016x}" for one in there[:1].tolist() for half in one)
            count, before = count + len(there), halves
        return count, example


class Keys(Subset):
    """A table of shard and key, or of shard and index in the shard, or of all three.

    Args:
        url: of the table, for errors.
        table: a row for each copy of a pair.

    Raises:
        UserError: the table has no such columns.
    """

    def __init__(self, url: str, table: pa.Table):
        self.url = url
        names = [name for name in ("shard", "index", "key") if table.column_names.count(name) == 1]
        if "shard" not in names or len(names) < 2:
            raise UserError(f"{url} has columns {', '.join(table.column_names)}: shard and key are needed")
        try:
            types = {"shard": pa.string(), "index": pa.int32(), "key": pa.large_string()}
            table = table.select(names).cast(pa.schema([(name, types[name]) for name in names]))
        except pa.ArrowException as error:
            raise UserError(f"{url}: {' '.join(str(error).split())[:200]}: shard and key are text, index is a number") from None
        if any(table[name].null_count for name in names):
            raise UserError(f"{url} has rows without shard, key or index")
        shards = table["shard"].dictionary_encode().combine_chunks()
        codes = shards.indices.to_numpy()
        order, counts = np.argsort(codes, kind="stable"), np.bincount(codes, minlength=len(shards.dictionary))
        ends = np.cumsum(counts)
        places = zip(shards.dictionary.to_pylist(), ends - counts, ends, strict=True)
        self.rows = {shard: order[start:end] for shard, start, end in places}  # by shard, the rows of the table
        self.table, self._missing, self._example = table.drop_columns("shard"), 0, ""

    def __len__(self) -> int:
        return len(self.table)

    def copies(self, shard: str, pairs: pa.Table) -> NDArray[np.int64]:
        """See `Subset`.

        Raises:
            UserError: the key of a row is not that of the pair at its index, or several pairs have the key of a row.
        """
        if shard not in self.rows:
            return np.zeros(len(pairs), np.int64)
        rows = self.table.take(self.rows.pop(shard))
        by = rows.column_names[0]
        known = pairs.select(rows.column_names).cast(rows.schema)
        if pc.count_distinct(known[by]).as_py() < len(pairs):
            raise UserError(f"{self.url}: several pairs of {shard} have one {by}: the column index is needed")
        at = pc.index_in(rows[by], value_set=known[by].combine_chunks())
        found = rows.filter(pc.is_valid(at))
        if not known.take(pc.drop_null(at)).equals(found):
            raise UserError(f"{self.url} has other keys at the indices of {shard} than the run: it is of another corpus")
        self._miss(shard, rows.filter(pc.is_null(at)))
        return np.bincount(pc.drop_null(at).to_numpy(), minlength=len(pairs))

    def missing(self) -> tuple[int, str]:
        """See `Subset`."""
        for shard in sorted(self.rows):
            self._miss(shard, self.table.take(self.rows.pop(shard)))
        return self._missing, self._example

    def _miss(self, shard: str, rows: pa.Table) -> None:
        self._missing += len(rows)
        if len(rows) and not self._example:
            self._example = f"{rows[rows.column_names[-1]][0]} of {shard}"


def read_subset(url: str) -> Subset:
    """Read a subset of either format. The uids of a DataComp subset stay in its file, or in a local copy of it.

    Raises:
        UserError: the file does not exist, or is no subset.
    """
    try:
        source = storage.describe(url)
    except FileNotFoundError:
        raise UserError(f"no subset {url}") from None
    with storage.local_copy(source, storage.ATTEMPTS) as file:
        start = file.read(len(PARQUET))
        file.seek(0)
        if start == PARQUET:
            try:
                return Keys(url, storage.parse_table(file.read()))
            except pa.ArrowException as error:
                raise UserError(f"{url} is no Parquet file: {' '.join(str(error).split())[:200]}") from None
        try:
            halves: NDArray[Any] = np.lib.format.open_memmap(file.name, "r")
        except ValueError as error:
            raise UserError(f"{url} is no .npy file, and no Parquet: {error}") from None
    if halves.dtype != SUBSET:
        raise UserError(f"{url} holds {halves.dtype}, a DataComp subset holds {SUBSET}")
    halves = halves.reshape(-1)
    _expect_sorted(url, halves)
    return Uids(halves)


def _expect_sorted(url: str, halves: NDArray[np.void]) -> None:
    for start in range(0, len(halves), CHUNK):
        some = halves[start : start + CHUNK + 1]
        high, low = some["f0"], some["f1"]
        wrong = (high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))
        if wrong.any():
            at = start + int(wrong.argmax()) + 1
            raise UserError(f"{url} is not sorted: entry {at} is below the one before it, and uids are looked up by bisection")
