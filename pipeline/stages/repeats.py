"""The end of `publish`: which uids, and which images, several pairs of the corpus have.

That takes a sort of all pairs. Few are sorted by the driver. Many are dealt by the first byte of what is sorted: tasks read the
published tables, some shards each, and other tasks sort a share each.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.exact_copies import ExactCopies
from pipeline.corpus.uids import Uids, pack, unpack
from pipeline.errors import UserError
from pipeline.run_folder.finished import Finished, open_run
from pipeline.run_folder.tables import Accounting
from pipeline.workers.cluster import Resources

FEW = 2_000_000  # pairs that the driver sorts itself
OF_A_SHARE = 4_000_000  # pairs that a task sorts
MOST = 256  # shares, and tasks that read
COLUMNS = ("uid", "image_hash")


class Values(NamedTuple):
    """Some pairs' values of one column."""

    packed: NDArray[np.bytes_]  # [N] S16
    place: NDArray[np.int64]  # [N] number of the shard << 32 | row


class Repeated(NamedTuple):
    """What some pairs share with others."""

    pairs: int  # that share their value
    value: str  # the smallest of these values; empty if there are none
    place: int  # of the first pair that has it


def counted(finished: Finished, done: dict[str, Accounting], resources: Resources) -> Finished:
    """A finished run with what there is to know about the uids of its pairs, and about exact copies of their images.

    A record of the same columns has it already.

    Args:
        finished: the run.
        done: accounting of the shards of its corpus.
        resources: of the tasks that read and sort, if there are many pairs.
    """
    with suppress(UserError):
        before = open_run(finished.folder)
        if before.id == finished.id and before.uids.pairs and before.exact_copies.pairs:
            return finished._replace(uids=before.uids, exact_copies=before.exact_copies)
    shards, pairs = sorted(shard for shard, a in done.items() if a.embedded), sum(a.embedded for a in done.values())
    urls = [finished.url(shard) for shard in shards]
    uids, images = _repeated(list(enumerate(urls)), pairs, resources)
    return finished._replace(
        uids=Uids(
            pairs=pairs,
            without=sum(a.without_uid for a in done.values()),
            other=sum(a.other_uid for a in done.values()),
            example=next((a.other_uid_example for a in done.values() if a.other_uid), ""),
            repeated=uids.pairs,
            shared=uids.value,
        ),
        exact_copies=ExactCopies(pairs, images.pairs, _name(shards, urls, images.place) if images.pairs else ""),
    )


def _repeated(tables: list[tuple[int, str]], pairs: int, resources: Resources) -> list[Repeated]:
    """What is repeated in each of COLUMNS, over numbered tables that have so many pairs together."""
    if pairs <= FEW:
        return _sort(*_deal(tables, 1))
    shares = min(MOST, -(-pairs // OF_A_SHARE))
    readers = min(MOST, len(tables))
    deal: Any = ray.remote(**resources.reader, max_retries=2, num_returns=shares)(_deal if shares > 1 else _deal_one)
    sort: Any = ray.remote(**resources.reader, max_retries=2)(_sort)
    dealt = [deal.remote(tables[i::readers], shares) for i in range(readers)]
    of_share = zip(*dealt, strict=True) if shares > 1 else [dealt]
    sorted_ = ray.get([sort.remote(*parts) for parts in of_share])
    return [_together(of_column) for of_column in zip(*sorted_, strict=True)]


def _together(shares: Iterable[Repeated]) -> Repeated:
    """What is repeated in all shares, which are in the order of their values."""
    some = [share for share in shares if share.pairs]
    return some[0]._replace(pairs=sum(share.pairs for share in some)) if some else Repeated(0, "", -1)


def _deal(tables: list[tuple[int, str]], shares: int) -> list[list[Values]]:
    """The values of each of COLUMNS in some tables, dealt into shares by their first bytes."""

    def read(table: tuple[int, str]) -> list[Values]:
        number, url = table
        part = storage.parse_table(storage.read_bytes(url), list(COLUMNS))
        place = (number << 32) + np.arange(len(part), dtype=np.int64)
        return [Values(pack(part[name].to_pylist()), place) for name in COLUMNS]

    read_tables = list(storage.in_threads(read, tables))
    columns = [_join([of_table[i] for of_table in read_tables]) for i in range(len(COLUMNS))]
    return [[_of_share(column, share, shares) for column in columns] for share in range(shares)]


def _deal_one(tables: list[tuple[int, str]], shares: int) -> list[Values]:
    return _deal(tables, 1)[0]


def _of_share(values: Values, share: int, shares: int) -> Values:
    first = values.packed.view(np.uint8).reshape(-1, 16)[:, 0].astype(np.int64)
    mine = first * shares // 256 == share
    return Values(values.packed[mine], values.place[mine])


def _sort(*parts: list[Values]) -> list[Repeated]:
    """What is repeated in each of COLUMNS, over the parts of one share."""
    return [_of_column(_join([part[i] for part in parts])) for i in range(len(COLUMNS))]


def _of_column(values: Values) -> Repeated:
    order = np.lexsort((values.place, values.packed))
    packed, place = values.packed[order], values.place[order]
    if len(packed) < 2:
        return Repeated(0, "", -1)
    same, edge = packed[1:] == packed[:-1], np.zeros(1, bool)
    again = np.flatnonzero(np.concatenate([same, edge]) | np.concatenate([edge, same]))
    if not len(again):
        return Repeated(0, "", -1)
    return Repeated(len(again), unpack(packed[again[:1]])[0], int(place[again[0]]))


def _join(values: list[Values]) -> Values:
    if not values:
        return Values(pack([]), np.empty(0, np.int64))
    return Values(np.concatenate([v.packed for v in values]), np.concatenate([v.place for v in values]))


def _name(shards: list[str], urls: list[str], place: int) -> str:
    """Shard and key of a pair."""
    number, row = place >> 32, place & 0xFFFFFFFF
    keys = storage.parse_table(storage.read_bytes(urls[number]), ["key"])["key"]
    return f"{shards[number]} {keys[row].as_py()}"
