"""Stage `select`: choose the pairs to train on by a column.

Columns are read shard by shard, and no pair's uid, key or number stays in memory. `write` says which pairs were chosen.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from statistics import fmean
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.corpus.uids import pack_column
from pipeline.errors import RunError, UserError
from pipeline.results.edges import Keys, find_edges
from pipeline.results.numbers import read_numbers
from pipeline.results.subset import Subset
from pipeline.results.where import Where
from pipeline.run_folder.columns import IDENTITY
from pipeline.run_folder.finished import Finished

Shards = Callable[[list[str]], Iterable[tuple[str, pa.Table]]]
"""`Finished.of_shards`: the name of each shard and the columns that are asked for. Every call gives the same pairs."""


def of_table(table: pa.Table) -> Shards:
    """A table in memory as the only shard."""
    return lambda columns: [("", table)]


class Selected:
    """Which pairs are kept, and how often each is to be trained on. In memory a pair takes a bit, or 4 bytes if copies count.

    Args:
        copies: of each shard, [n] whether a pair is kept, or how often it is to be trained on; 0 drops a pair.
    """

    def __init__(self, copies: Iterable[NDArray[np.bool_] | NDArray[np.int32]] = ()):
        self._shards: list[tuple[int, NDArray[Any]]] = []
        for of_shard in copies:
            self.append(of_shard)

    def append(self, copies: NDArray[np.bool_] | NDArray[np.int32]) -> None:
        """Add the pairs of the next shard."""
        self._shards.append((len(copies), np.packbits(copies) if copies.dtype == bool else copies))

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        """Of each shard, [n] how often a pair is to be trained on."""
        for count, stored in self._shards:
            yield np.unpackbits(stored, count=count).astype(np.int32) if stored.dtype == np.uint8 else stored.astype(np.int32)

    def __len__(self) -> int:
        """N, the number of pairs, kept or not."""
        return sum(count for count, _ in self._shards)

    def count(self) -> tuple[int, int, int]:
        """How many pairs are kept, how often they are to be trained on in all, and how often the one that is most often."""
        found = [(int((one > 0).sum()), int(one.sum()), int(one.max(initial=0))) for one in self]
        return (
            sum(kept for kept, _, _ in found),
            sum(copies for _, copies, _ in found),
            max((m for _, _, m in found), default=0),
        )

    @property
    def copies(self) -> NDArray[np.int32]:
        """[N] how often each pair is to be trained on, shard after shard."""
        return np.concatenate([np.empty(0, np.int32), *self])

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[N] whether a pair is kept, shard after shard."""
        return self.copies > 0

    def beside(self, shards: Iterable[tuple[str, pa.Table]]) -> Iterator[tuple[pa.Table, NDArray[np.int32]]]:
        """The table of each shard and the copies of its pairs.

        Raises:
            RunError: the tables have not the pairs that were selected from.
        """
        sizes = iter(self)
        for _, part in shards:
            copies = next(sizes, None)
            if copies is None or len(copies) != len(part):
                raise _changed()
            yield part, copies
        if next(sizes, None) is not None:
            raise _changed()


class Limits(NamedTuple):
    """Which pairs may be kept, whatever their rank."""

    where: Where | None = None  # those of which this condition holds
    within: tuple[Subset, ...] = ()  # those that are in all of these subsets
    plus: tuple[Subset, ...] = ()  # those in any of these subsets are kept in any case, beside the others

    @property
    def choose(self) -> bool:
        """Whether they leave pairs out."""
        return bool(self.where or self.within)


NO_LIMITS = Limits()
MOST_GROUPS = 1 << 18


def select(shards: Shards, by: str | None, keep: float, limits: Limits = NO_LIMITS, per: str | None = None) -> Selected:
    """Keep the best share of the pairs.

    Columns are read once. The ranks lie in a scratch file meanwhile, 4 bytes a pair of a column in float32. Uids are read only
    where some of several equal values are kept: once for every 16 bits that tell the last kept uid from the next one.

    Args:
        shards: gives tables with `uid` and the columns.
        by: the column to rank by. The metadata of its field says which end is good; by default high is. None keeps all that may
            be kept.
        keep: share of all pairs, 0 to 1. Exactly round(keep * pairs) are kept (half to even). Ties are broken by uid, and
            where uids repeat, by the order of the pairs. NaN and null are never kept. So fewer are kept if too few pairs have a
            number and are within the limits.
        limits: which pairs may be kept at all; by default any.
        per: a column of text or integers. The share is then one of each group of pairs with the same value in it. Those without
            a value are a group.

    Raises:
        UserError: the share is outside 0 to 1, the column is no score, or that of the groups has fractions or too many values.
        RunError: the tables have changed meanwhile.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep}: a share of the pairs, above 0 and at most 1")
    if by is not None:
        expect_score(by)
    with tempfile.TemporaryDirectory(prefix="ecif-") as scratch:
        candidates = _Candidates(shards, by, limits, per, scratch)
        if by is None:
            return candidates.and_plus(candidates.among)
        edges = find_edges(candidates.keys, [candidates.bits, 64, 64], candidates.counts(keep))
        kept = edges.kept(candidates.keys(len(edges.words)))
        return candidates.and_plus(candidates.spread(kept))


def expect_score(by: str) -> None:
    """Raise UserError if a column says which pair a row is."""
    if by in IDENTITY:
        raise UserError(f"column {by!r} says which pair it is, not how good it is")


class _Candidates:
    """The pairs that may be kept, and their ranks."""

    def __init__(self, shards: Shards, by: str | None, limits: Limits, per: str | None, scratch: str):
        self.shards, self.per = shards, per
        self.ranks, self.groups = (os.path.join(scratch, name) for name in ("ranks", "groups"))
        self.names: dict[Any, int] = {} if per else {None: 0}  # of the groups
        self.pairs, self.candidates = np.zeros((2, MOST_GROUPS if per else 1), np.int64)  # of each group
        self.dtype: np.dtype[Any] = np.dtype(np.uint32)
        self.among, self._plus = Selected(), Selected()
        with open(self.ranks, "wb") as ranks, open(self.groups, "wb") as groups:
            self._read(by, limits, ranks, groups)

    def _read(self, by: str | None, limits: Limits, ranks: BinaryIO, groups: BinaryIO) -> None:
        """Find the pairs that may be kept, and append their ranks and groups to the files."""
        where, subsets = limits.where, [*limits.within, *limits.plus]
        columns = [by or "uid", *(where.columns if where else []), *(["index", "key", "uid"] if subsets else [])]
        columns += [self.per] if self.per else []
        for shard, part in self.shards(list(dict.fromkeys(columns))):
            may = where.holds(part) if where else np.ones(len(part), bool)
            there = [subset.copies(shard, part) > 0 for subset in subsets]
            may = np.logical_and.reduce([may, *there[: len(limits.within)]])
            if by is not None:
                numbers = read_numbers(part, by)
                may &= numbers.there
                rank = numbers.ranks()
                self.dtype = rank.dtype
                rank[may].tofile(ranks)
            group = self._group(part)
            np.add.at(self.pairs, group, 1)
            np.add.at(self.candidates, group[may], 1)
            if self.per:
                group[may].tofile(groups)
            self.among.append(may)
            if limits.plus:
                self._plus.append(np.logical_or.reduce(there[len(limits.within) :]))

    def _group(self, part: pa.Table) -> NDArray[np.int64]:
        """[n] the number of the group of each pair of a shard."""
        if self.per is None:
            return np.zeros(len(part), np.int64)
        column = part[self.per]
        if not (pa.types.is_integer(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise UserError(f"--per {self.per}: the column holds {column.type}, not text or integers")
        found = column.combine_chunks().dictionary_encode(null_encoding="encode")
        numbers = [self.names.setdefault(name, len(self.names)) for name in found.dictionary.to_pylist()]
        if len(self.names) > MOST_GROUPS:
            raise UserError(f"--per {self.per}: the column has more than {MOST_GROUPS} values")
        return np.array(numbers, np.int64)[found.indices.to_numpy()]

    def counts(self, keep: float) -> NDArray[np.int64]:
        """[G] how many pairs of each group are kept."""
        return np.minimum(np.rint(keep * self.pairs).astype(np.int64), self.candidates)[: len(self.names)]

    def and_plus(self, kept: Iterable[NDArray[Any]]) -> Selected:
        """The kept pairs of each shard, and those that are kept in any case."""
        if not len(self._plus):
            return Selected(one > 0 for one in kept)
        return Selected((one > 0) | (more > 0) for one, more in zip(kept, self._plus, strict=True))

    @property
    def bits(self) -> int:
        """Bits of a rank."""
        return 8 * self.dtype.itemsize

    def keys(self, words: int) -> Iterator[Keys]:
        """Of the candidates of each shard, the first of: rank, both halves of the uid."""
        with open(self.ranks, "rb") as ranks, open(self.groups, "rb") as groups:
            for may, uids in self._uids() if words > 1 else ((may, []) for may in self.among):
                count = int(may.sum())
                rank = np.fromfile(ranks, self.dtype, count).astype(np.uint64)
                group = np.fromfile(groups, np.int64, count) if self.per else np.zeros(count, np.int64)
                yield Keys([rank, *uids[: words - 1]], group)

    def _uids(self) -> Iterator[tuple[NDArray[np.int32], list[NDArray[np.uint64]]]]:
        for part, may in self.among.beside(self.shards(["uid"])):
            halves = pack_column(part["uid"])[may > 0].view(">u8").reshape(-1, 2).astype(np.uint64)
            yield may, [halves[:, 0], halves[:, 1]]

    def spread(self, kept: Iterable[NDArray[np.bool_]]) -> Iterator[NDArray[np.bool_]]:
        """Of each shard, [n] whether a pair is kept, given which of the candidates are."""
        for may, of_candidates in zip(self.among, kept, strict=True):
            of_pairs = np.zeros(len(may), bool)
            of_pairs[np.flatnonzero(may)] = of_candidates
            yield of_pairs


def _changed() -> RunError:
    return RunError("a run has replaced the columns, they have changed meanwhile: select again")


def chosen_filter(run: Finished, by: str | None, keep: float | None) -> tuple[str, float]:
    """The column to rank by and the share to keep. A None is replaced by what the stage `filter` of the run chose.

    Raises:
        UserError: the run chose no filter, or it has several targets and none is named.
    """
    if by is not None and keep is not None:
        return by, keep
    shares = defaultdict[str, list[float]](list)
    for checkpoint in run.checkpoints:
        for name, facts in checkpoint.targets.items():
            if "filter" in facts:
                shares[f"filter_{name}"].append(facts["filter"]["keep"])
    filters = {name: fmean(of_checkpoints) for name, of_checkpoints in shares.items()}
    if by is None:
        if not filters:
            raise UserError(f"{run.folder} has no filter of its own (filter: null): give --by and --keep")
        if len(filters) > 1:
            raise UserError(f"the run has a filter for each target: give --by {' or '.join(filters)}")
        (by,) = filters
    if keep is None:
        if by not in filters:
            raise UserError(f"--by {by} needs --keep, the share of the pairs to keep; only filters have a share of their own")
        keep = filters[by]
    return by, keep
