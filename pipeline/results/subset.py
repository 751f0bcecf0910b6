"""Read which pairs a subset holds, and find them in the columns of a run, shard by shard."""

import io
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.uids import PACKED, pack, unpack
from pipeline.errors import UserError
from pipeline.results.write import SUBSET

PARQUET = b"PAR1"  # first bytes


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
        uids: packed, in any order.
    """

    def __init__(self, uids: NDArray[np.bytes_]):
        self.uids, self.counts = np.unique(uids, return_counts=True)
        self.pairs = np.zeros(len(self.uids), np.int32)  # that have the uid

    def __len__(self) -> int:
        return len(self.uids)

    def copies(self, shard: str, pairs: pa.Table) -> NDArray[np.int64]:
        """See `Subset`."""
        uids = pack(pairs["uid"].to_pylist())
        at = np.searchsorted(self.uids, uids).clip(max=len(self.uids) - 1)
        there = self.uids[at] == uids
        np.add.at(self.pairs, at[there], 1)
        return np.where(there, self.counts[at], 0)

    def missing(self) -> tuple[int, str]:
        """See `Subset`."""
        return _some(self.uids, self.pairs == 0)

    def ambiguous(self) -> tuple[int, str]:
        """See `Subset`."""
        return _some(self.uids, self.pairs > 1)


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
    """Read a subset of either format.

    Raises:
        UserError: the file does not exist, or is no subset.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise UserError(f"no subset {url}") from None
    if data.startswith(PARQUET):
        try:
            table = storage.parse_table(data)
        except pa.ArrowException as error:
            raise UserError(f"{url} is no Parquet file: {' '.join(str(error).split())[:200]}") from None
        return Keys(url, table)
    try:
        halves: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{url} is no .npy file, and no Parquet: {error}") from None
    if halves.dtype != SUBSET:
        raise UserError(f"{url} holds {halves.dtype}, a DataComp subset holds {SUBSET}")
    return Uids(halves.reshape(-1).view("u8").astype(">u8").view(PACKED))


def _some(uids: NDArray[np.bytes_], which: NDArray[np.bool_]) -> tuple[int, str]:
    """The number of some uids, and the first of them."""
    return int(which.sum()), unpack(uids[which][:1])[0] if which.any() else ""
