"""Check that every object of one shard exists and holds what it has to hold."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus import sidecar
from pipeline.corpus.reasons import REASONS
from pipeline.corpus.shards import Shard
from pipeline.run_folder import tables, tensors
from pipeline.run_folder.dataset import Places, is_of
from pipeline.run_folder.tables import Accounting

PLACE = ["index", "key", "uid", "image_hash"]  # which pair a row is, within its shard
HASH = "^[0-9a-f]{32}$"
NORM = 0.01  # tolerance for a norm of 1; rounding to half precision changes it by less
Read = TypeVar("Read")


class Violation(NamedTuple):
    """One object that is not as it has to be."""

    url: str
    wrong: str


class Checked(NamedTuple):
    """Counts of what was checked, of one shard or of all shards of a dataset."""

    shards: int = 0
    pairs: int = 0
    embedded: int = 0
    scored: int = 0
    quarantined: Counter[str] = Counter()
    parts: int = 0


class Expected(NamedTuple):
    """A table that a shard with usable pairs has to have."""

    url: Callable[[str, str], str]  # given the shard's name and the fingerprint of its content
    columns: list[str]  # beside `index`


class ToCheck(NamedTuple):
    """A shard, and the sidecar that holds its uids; None if the JSON of its pairs does."""

    shard: Shard
    uids: storage.Object | None


class CheckShard:
    """Check every object of a shard.

    Args:
        places: of the corpus, or of a target.
        expected: the tables of each of its shards.
        beside: URLs of further objects of tensors that each shard has to have, as functions of its name and its content.
    """

    def __init__(self, places: Places, expected: list[Expected], beside: list[Callable[[str, str], str]]):
        self.places, self.expected, self.beside = places, expected, beside

    def __call__(self, asked: ToCheck) -> tuple[Checked, list[Violation]]:
        """Check one shard. Returns counts and violations."""
        shard, found = asked.shard, list[Violation]()
        url = self.places.accounting_url(shard.name)
        done = read_object(url, _accounting, found)
        if done is None:
            return Checked(), found
        found += [Violation(url, wrong) for wrong in _miscounted(done)]
        if done.shard != shard.name or not is_of(done, shard, asked.uids):
            found.append(Violation(url, f"is not of {shard.source.url} as it is now; the same `ecif run` embeds it anew"))
        quarantined = self._quarantine(done, found)
        places = self._features(done, found)
        if places is not None and quarantined is not None:
            indices = np.sort(np.concatenate([places["index"].to_numpy(), quarantined]))
            if not np.array_equal(indices, np.arange(done.pairs)):
                found.append(Violation(url, f"its {done.pairs} pairs are not each embedded or quarantined exactly once"))
        for expected in self.expected:
            if places is not None:
                self._of_pairs(expected, shard.name, done.content, places, found)
        for of_shard in self.beside if done.embedded else []:
            check_tensors(of_shard(shard.name, done.content), found)
        scored = done.embedded * bool(self.expected)
        return Checked(1, done.pairs, done.embedded, scored, Counter(done.quarantined), done.parts), found

    def _quarantine(self, done: Accounting, found: list[Violation]) -> NDArray[np.int32] | None:
        """Indices of the quarantined pairs; None if the table can't be read."""
        url = self.places.quarantine_url(done.shard)
        if not done.quarantined and not storage.exists(url):
            return np.empty(0, np.int32)
        table = read_object(url, _table, found)
        if table is None:
            return None
        if not table.schema.equals(tables.QUARANTINE):
            found.append(Violation(url, f"has columns {', '.join(table.column_names)} of other names or types"))
            return None
        rows = dict(Counter(table["reason"].to_pylist()))
        if rows != done.quarantined:
            found.append(Violation(url, f"has rows {_counts(rows)}, the accounting says {_counts(done.quarantined)}"))
        if unknown := rows.keys() - set(REASONS):
            found.append(Violation(url, f"has reasons that there are not: {', '.join(sorted(unknown))}"))
        if set(table["shard"].to_pylist()) - {done.shard}:
            found.append(Violation(url, "has rows of another shard"))
        return table["index"].to_numpy()

    def _features(self, done: Accounting, found: list[Violation]) -> pa.Table | None:
        """The columns PLACE of the embedded pairs, in order; None if a part can't be read."""
        folder = self.places.features_folder(done.shard)
        expected = {tables.part_name(i) for i in range(done.parts)}
        extra = [url for url in self.places.parts(done.shard) if url.rpartition("/")[2] not in expected]
        found += [Violation(url, "is no part by the accounting") for url in extra]
        places: list[pa.Table] = []
        for name in sorted(expected):
            url = storage.join(folder, name)
            part = read_object(url, _part, found)
            if part is not None:
                places.append(part[0])
                found += [Violation(url, wrong) for wrong in part[1]]
        if len(places) < len(expected):
            return None
        together = pa.concat_tables(places).combine_chunks()
        if len(together) != done.embedded:
            found.append(Violation(folder, f"has {len(together)} pairs, the accounting says {done.embedded} embedded"))
        return together

    def _of_pairs(self, expected: Expected, shard: str, content: str, places: pa.Table, found: list[Violation]) -> None:
        """Check one table of a shard. A shard without embedded pairs must not have it."""
        url = expected.url(shard, content)
        if not len(places):
            if storage.exists(url):
                found.append(Violation(url, "is of a shard without a usable pair"))
            return
        table = read_object(url, _table, found)
        if table is None:
            return
        missing = [name for name in ("index", *expected.columns) if name not in table.column_names]
        if missing:
            found.append(Violation(url, f"has no column {', '.join(missing)}"))
            return
        identity = [name for name in PLACE if name in table.column_names]
        if len(table) != len(places):
            found.append(Violation(url, f"has {len(table)} rows for {len(places)} embedded pairs"))
        elif wrong := [name for name in identity if not table[name].combine_chunks().equals(places[name].combine_chunks())]:
            found.append(Violation(url, f"has other pairs than the features, or in another order: {', '.join(wrong)}"))
        if "shard" in table.column_names and set(table["shard"].unique().to_pylist()) != {shard}:
            found.append(Violation(url, "has rows of another shard"))
        own = [f.name for f in table.schema if pa.types.is_floating(f.type) and not f.name.startswith(sidecar.PREFIX)]
        if bad := [name for name in own if not pc.all(pc.is_finite(table[name]), skip_nulls=False).as_py()]:
            found.append(Violation(url, f"has NaN or infinity in {', '.join(bad)}"))


def check_tensors(url: str, found: list[Violation]) -> None:
    """Check that an object of tensors exists, can be read and is finite."""
    read = read_object(url, lambda data: tensors.parse(data)[0], found)
    if read is not None and (infinite := [name for name, tensor in read.items() if not tensor.isfinite().all()]):
        found.append(Violation(url, f"holds NaN or infinity: {', '.join(infinite)}"))


def read_object(url: str, parse: Callable[[bytes], Read], found: list[Violation]) -> Read | None:
    """Read and parse an object. If it is missing or can't be parsed, add a violation and return None."""
    try:
        return parse(storage.read_bytes(url))
    except FileNotFoundError:
        found.append(Violation(url, "is missing"))
    except Exception as error:  # noqa: BLE001  (each parser has errors of its own)
        found.append(Violation(url, f"can't be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    return None


def _table(data: bytes) -> pa.Table:
    return storage.parse_table(data, verify=True)


def _part(data: bytes) -> tuple[pa.Table, list[str]]:
    """The columns PLACE of a part, and what is wrong with its features. The features are not kept in memory."""
    table = _table(data)
    features = tables.as_features(table)
    wrong = []
    for name, vectors in (("image_features", features.images), ("text_features", features.texts)):
        squares = np.square(vectors, dtype=np.float32).sum(1)
        off = ~(np.abs(squares - 1) < 2 * NORM)  # NaN is off, too
        if off.any():
            wrong.append(f"{off.sum()} of {len(off)} {name} are not of norm 1")
    odd = len(table) - (pc.sum(pc.match_substring_regex(table["image_hash"], HASH)).as_py() or 0)
    return table.select(PLACE), wrong + ([f"{odd} of {len(table)} image_hash are not 32 hex digits"] if odd else [])


def _accounting(data: bytes) -> Accounting:
    done = Accounting(**json.loads(data))
    counts: list[Any] = [done.members, done.in_pairs, done.ignored, done.pairs, done.embedded, done.parts]
    if not all(type(count) is int and count >= 0 for count in [*counts, *done.quarantined.values()]):
        raise ValueError("a count is no count")
    return done


def _miscounted(done: Accounting) -> list[str]:
    wrong = []
    if done.members != done.in_pairs + done.ignored:
        wrong.append(f"{done.members} members, but {done.in_pairs} in pairs and {done.ignored} ignored")
    if done.pairs != done.embedded + sum(done.quarantined.values()):
        wrong.append(f"{done.pairs} pairs, but {done.embedded} embedded and {_counts(done.quarantined)} quarantined")
    return wrong


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
