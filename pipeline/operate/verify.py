"""Is a run folder whole: every pair scored, or quarantined with its reason, and every object what it has to be."""

import io
import json
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus import sidecar
from pipeline.corpus.reasons import REASONS
from pipeline.corpus.shards import Shard
from pipeline.errors import UserError
from pipeline.run import load_run
from pipeline.run_folder import tables
from pipeline.run_folder import tensors as heads
from pipeline.run_folder.dataset import Dataset, in_folder
from pipeline.run_folder.started import read_plan
from pipeline.run_folder.tables import Accounting

PLACE = ["index", "key", "uid"]  # which pair a row is, within its shard
NORM = 0.01  # how far from 1 rounding to half precision can take a norm, with room
INDEX = {  # columns of its tables
    "index": ["positive", "positive_scale", "negative", "negative_scale"],
    "self_influence": ["self_influence", "gram_positive", "gram_mixed", "gram_negative"],
}
ON_REQUEST = ("directions", "second_order", "parameters", "targets", "index")  # where there may be more tensors
Read = TypeVar("Read")


class Violation(NamedTuple):
    """One thing that is not as it has to be."""

    url: str
    wrong: str


class Checked(NamedTuple):
    """What was found sound of a shard, or of all shards of a dataset."""

    shards: int = 0
    pairs: int = 0
    embedded: int = 0
    scored: int = 0
    quarantined: Counter[str] = Counter()
    parts: int = 0


def verify(folder: str, report: Callable[[Violation], None]) -> dict[str, Checked]:
    """Check everything that the run which was started last in a folder has left there.

    Args:
        folder: of the run.
        report: called with each violation as it is found.

    Returns:
        What was checked, by dataset (and checkpoint, where there are several).

    Raises:
        UserError: no run there, one that is not finished, or its corpus is not where it was.
    """
    plan = read_plan(folder)
    final = plan.scores()
    if final is None or not storage.exists(storage.join(folder, "run.json")):
        raise UserError(f"{folder}: the run is not finished; `ecif status {folder}` says how far it is")
    facts = load_run(folder)
    if facts["scores"] != final:
        report(Violation(storage.join(folder, "run.json"), "is of another configuration than the run that was started last"))
    checked, tensors = {}, list[str]()
    for i, (ids, datasets) in enumerate(zip(plan.checkpoints, plan.datasets(), strict=True)):
        kinds = ("heads", "directions", *(["filter"] if plan.config.filter else []))
        tensors += [storage.join(folder, kind, f"{ids[kind]}.safetensors") for kind in kinds]
        columns = {storage.join(folder, "scores", s): _columns(plan.config) for s in dict.fromkeys((ids["scores"], final))}
        if plan.config.index and i == 0:  # of the first checkpoint
            columns |= {storage.join(folder, kind, facts[kind]): asked for kind, asked in INDEX.items()}
        for name, dataset in datasets.items():
            each = f"{name}, checkpoint {i}" if len(plan.checkpoints) > 1 else name
            checked[each] = _check_dataset(dataset, columns if name == "corpus" else {}, report)
    if plan.config.index:
        tensors += [storage.join(folder, "index", facts["index"], f"{one}.safetensors") for one in ("projection", "curvature")]
    listed = [item.url for kind in ON_REQUEST for item in storage.listing(storage.join(folder, kind), ".safetensors")]
    known = {_last_two(url) for url in tensors}
    for violations in storage.in_threads(_tensors, [*tensors, *(url for url in listed if _last_two(url) not in known)]):
        for violation in violations:
            report(violation)
    return checked


def _last_two(url: str) -> tuple[str, ...]:
    """Folder and name, which a listing and a run folder given as a relative path agree on."""
    return tuple(url.split("/")[-2:])


def _columns(config: Config) -> list[str]:
    """Of a score table, beside identities."""
    influences = [f"influence_{part}{name}" for name in config.targets for part in ("positive_", "negative_", "")]
    filters = [f"filter_{name}" for name in config.targets] if config.filter else []
    leverage = ["leverage"] if config.score.order == 2 else []
    carried = [sidecar.PREFIX + name for name in config.corpus.sidecar]
    return ["clip_score", "held_out_loss", "agreement", *influences, "misalignment", *filters, *leverage, *carried]


def _check_dataset(dataset: Dataset, columns: dict[str, list[str]], report: Callable[[Violation], None]) -> Checked:
    """All shards of a dataset, in threads; what is in memory at once is a part of a few shards."""
    tables_of = [in_folder(folder, ".parquet") for folder in columns]
    names = {shard.name for shard in dataset.shards}
    for of in tables_of:
        for shard in sorted(of.keys() - names):
            report(Violation(of[shard].url, "is of no shard of the corpus"))
    total = Checked()
    check = _Check(dataset, columns)
    for done, violations in storage.in_threads(check, dataset.shards):
        total = Checked(*map(operator.add, total, done))
        for violation in violations:
            report(violation)
    return total


def _tensors(url: str) -> list[Violation]:
    found: list[Violation] = []
    if (read := _read(url, lambda _: heads.read(url)[0], found)) is not None:
        infinite = [name for name, tensor in read.items() if not tensor.isfinite().all()]
        if infinite:
            found.append(Violation(url, f"holds NaN or infinity: {', '.join(infinite)}"))
    return found


class _Check:
    """What the objects of one shard have to be, held against what they are."""

    def __init__(self, dataset: Dataset, columns: dict[str, list[str]]):
        """The tables that there are of the dataset's pairs: their folders, and what columns each has."""
        self.dataset, self.columns = dataset, columns

    def __call__(self, shard: Shard) -> tuple[Checked, list[Violation]]:
        found: list[Violation] = []
        url = self.dataset.accounting_url(shard.name)
        done = _read(url, _accounting, found)
        if done is None:
            return Checked(), found
        found += [Violation(url, wrong) for wrong in _miscounted(done)]
        if done.shard != shard.name or not self.dataset.is_of(done, shard):
            found.append(Violation(url, f"is not of {shard.source.url} as it is now; the same `ecif run` embeds it anew"))
        quarantined = self._quarantine(done, found)
        places = self._features(done, found)
        if places is not None and quarantined is not None:
            indices = np.sort(np.concatenate([places["index"].to_numpy(), quarantined]))
            if not np.array_equal(indices, np.arange(done.pairs)):
                found.append(Violation(url, f"its {done.pairs} pairs are not each embedded or quarantined exactly once"))
        for folder, columns in self.columns.items():
            if places is not None:
                self._of_pairs(storage.join(folder, f"{shard.name}.parquet"), shard.name, places, columns, found)
        scored = done.embedded * bool(self.columns)
        return Checked(1, done.pairs, done.embedded, scored, Counter(done.quarantined), done.parts), found

    def _quarantine(self, done: Accounting, found: list[Violation]) -> NDArray[np.int32] | None:
        """Indices of the quarantined pairs; None where they can't be had."""
        url = self.dataset.quarantine_url(done.shard)
        if not done.quarantined and not storage.exists(url):
            return np.empty(0, np.int32)
        table = _read(url, _table, found)
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
        """Places of the embedded pairs, in order; None where a part can't be read."""
        folder = self.dataset.features_folder(done.shard)
        expected = {tables.part_name(i) for i in range(done.parts)}
        extra = [url for url in self.dataset.parts(done.shard) if url.rpartition("/")[2] not in expected]
        found += [Violation(url, "is no part by the accounting") for url in extra]
        places: list[pa.Table] = []
        for name in sorted(expected):
            url = storage.join(folder, name)
            part = _read(url, _part, found)
            if part is not None:
                places.append(part[0])
                found += [Violation(url, wrong) for wrong in part[1]]
        if len(places) < len(expected):
            return None
        together = pa.concat_tables(places).combine_chunks()
        if len(together) != done.embedded:
            found.append(Violation(folder, f"has {len(together)} pairs, the accounting says {done.embedded} embedded"))
        return together

    def _of_pairs(self, url: str, shard: str, places: pa.Table, columns: list[str], found: list[Violation]) -> None:
        """The table of a shard that has embedded pairs; there is none of others."""
        if not len(places):
            if storage.exists(url):
                found.append(Violation(url, "is of a shard without a usable pair"))
            return
        table = _read(url, _table, found)
        if table is None:
            return
        missing = [name for name in (*PLACE, "shard", *columns) if name not in table.column_names]
        if missing:
            found.append(Violation(url, f"has no column {', '.join(missing)}"))
            return
        if len(table) != len(places):
            found.append(Violation(url, f"has {len(table)} rows for {len(places)} embedded pairs"))
        elif wrong := [name for name in PLACE if not table[name].combine_chunks().equals(places[name].combine_chunks())]:
            found.append(Violation(url, f"has other pairs than the features, or in another order: {', '.join(wrong)}"))
        if set(table["shard"].unique().to_pylist()) != {shard}:
            found.append(Violation(url, "has rows of another shard"))
        own = [f.name for f in table.schema if pa.types.is_floating(f.type) and not f.name.startswith(sidecar.PREFIX)]
        if bad := [name for name in own if not pc.all(pc.is_finite(table[name]), skip_nulls=False).as_py()]:
            found.append(Violation(url, f"has NaN or infinity in {', '.join(bad)}"))


def _read(url: str, parse: Callable[[bytes], Read], found: list[Violation]) -> Read | None:
    """An object, parsed; None and a violation where it is not there or makes no sense."""
    try:
        return parse(storage.read_bytes(url))
    except FileNotFoundError:
        found.append(Violation(url, "is missing"))
    except Exception as error:  # noqa: BLE001  (whatever is wrong with its bytes, each parser has errors of its own)
        found.append(Violation(url, f"can't be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    return None


def _table(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data), use_threads=False, page_checksum_verification=True)


def _part(data: bytes) -> tuple[pa.Table, list[str]]:
    """Places of a part's pairs, and what is wrong with their features; the features themselves are let go."""
    table = _table(data)
    features = tables.as_features(table)
    wrong = []
    for name, vectors in (("image_features", features.images), ("text_features", features.texts)):
        squares = np.square(vectors, dtype=np.float32).sum(1)
        off = ~(np.abs(squares - 1) < 2 * NORM)  # NaN is off, too
        if off.any():
            wrong.append(f"{off.sum()} of {len(off)} {name} are not of norm 1")
    return table.select(PLACE), wrong


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
