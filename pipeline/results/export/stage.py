"""Stage `export`: copy the pairs of a subset, shard by shard, in a format that a `Writer` knows."""

import itertools
import json
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ecif.registry import find_kind
from pipeline import storage
from pipeline.corpus.captions import caption_of, find_pairs
from pipeline.corpus.shards import Shard
from pipeline.corpus.tar import Contents, read_groups, read_member
from pipeline.errors import RunError, UserError
from pipeline.results.export.contract import KeptPair, Member, Writer
from pipeline.results.export.selection import find_selection
from pipeline.run_folder import tables
from pipeline.run_folder.finished import open_generation
from pipeline.sections import Embed, Reading
from pipeline.workers.cluster import session
from pipeline.workers.progress import Stage
from pipeline.workers.shards import as_tasks


class Exported(NamedTuple):
    """What an export wrote."""

    shards: int
    pairs: int
    usage: str  # a command that uses the export; empty if the format has none
    without_txt: int  # pairs without a .txt member, where trainers look for captions


def export(
    run: str,
    subset: str,
    out: str,
    writer: str = "webdataset",
    generation: int | None = None,
    since: int | None = None,
) -> Exported:
    """Copy the pairs of a subset. The same input gives the same bytes, so calling it again resumes.

    Args:
        run: folder of a finished run.
        subset: a file of `ecif select`. A pair that is in it several times is written as often.
        out: folder of the new shards.
        writer: the format: a name, or `package.module:Class` for your own `Writer`.
        generation, since: see `open_generation`.

    Raises:
        UserError: the writer does not exist, `out` holds other shards, or see `find_selection`.
        RunError: the corpus is not what the run scored.
    """
    try:
        kind = find_kind(Writer, writer)  # type: ignore[type-abstract]
    except ValueError as error:
        raise UserError(str(error)) from None
    selected = find_selection(open_generation(run, generation), subset, since)
    shards, kept = selected.shards(), selected.kept
    names = dict(zip([s.name for s in shards], kind.names([s.name for s in shards]), strict=True))
    _refuse_other_shards(out, kind.suffix, set(names.values()), selected.corpus)
    tasks = [_Task(s.name, s.source, storage.join(out, names[s.name]), selected.run.url(s.name)) for s in shards]
    sizes: dict[str, int] = {}
    without_txt = 0
    config = selected.run.config
    with session(config.workers), Stage("export", sum(s.source.size for s in shards), unit="bytes") as progress:
        rows = [task.to_row() | {"kept": kept[task.shard].tobytes()} for task in tasks]
        how = {"kind": kind, "how": (config.corpus.reading, config.embed)}
        for row in as_tasks(rows).map(_copy, fn_kwargs=how, num_cpus=1).iter_rows():
            shard, pairs = row["shard"], row["pairs"]
            sizes[names[shard]] = pairs
            without_txt += row["without_txt"]
            progress.advance(row["bytes"])
            if pairs != kept[shard][:, 1].sum():
                raise RunError(f"{shard}: {pairs} of {kept[shard][:, 1].sum()} pairs written; has it changed?")
    facts = {"model": config.model.name, "batch_size": config.batch_size, "loss": config.loss.name}
    origin = {"run": run, "subset": subset, **facts}
    usage = kind.finish(out, dict(sorted(sizes.items())), origin)
    return Exported(len(sizes), sum(sizes.values()), usage, without_txt)


def _refuse_other_shards(out: str, suffix: str, names: set[str], corpus: list[Shard]) -> None:
    """Raise UserError if `out` holds other shards: a trainer would read them too, and the corpus must not be written over."""
    folder = storage.filesystem(out)[1].rstrip("/") + "/"
    of_corpus = {shard.source.url for shard in corpus}
    for item in storage.listing(out, ""):
        name = item.url.partition(folder)[2]
        if item.url in of_corpus or (name.endswith(suffix) and name not in names):
            raise UserError(f"{out} has other shards in it ({name}): export to an empty folder")


class _Task(NamedTuple):
    """One shard to copy from."""

    shard: str
    source: storage.Object
    url: str  # of the object to write
    table: str  # URL of the columns of the shard's pairs

    def to_row(self) -> dict[str, Any]:
        return {"task": json.dumps(self)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "_Task":
        shard, source, url, table = json.loads(row["task"])
        return cls(shard, storage.Object(*source), url, table)


def _copy(row: dict[str, Any], kind: type[Writer], how: tuple[Reading, Embed]) -> dict[str, Any]:
    """Write the kept pairs of one shard, on a worker."""
    task = _Task.from_row(row)
    index, copies = np.frombuffer(row["kept"], np.int32).reshape(-1, 2).T
    table = tables.read_table(task.table)
    known: NDArray[np.int32] = table["index"].to_numpy()
    rows = table.take(np.searchsorted(known, index).clip(max=len(known) - 1))
    with (
        storage.local_copy(task.source, storage.ATTEMPTS) as file,
        tempfile.TemporaryDirectory(prefix="ecif-") as scratch,
    ):
        writer, without_txt = kind(task.url, scratch), 0
        for pair in _pairs(file, task.shard, how, rows, copies):
            writer.add(pair)
            without_txt += "txt" not in pair.members
        pairs = writer.close()
        writer.describe(rows.take(np.repeat(np.arange(len(rows)), copies)))
        return {"shard": task.shard, "bytes": task.source.size, "pairs": pairs, "without_txt": without_txt}


def _pairs(
    file: BinaryIO, shard: str, how: tuple[Reading, Embed], rows: pa.Table, copies: NDArray[np.int32]
) -> Iterator[KeptPair]:
    """Every copy of the pairs of some rows of the score table."""
    places = zip(*(rows[name].to_pylist() for name in ("index", "key", "uid")), copies.tolist(), strict=True)
    kept = {index: (key, uid, count) for index, key, uid, count in places}
    reading, limits = how
    taken = {pair.pair_key for pair in find_pairs(file, read_groups(file, Contents(), reading.key), reading, limits)}
    for group in find_pairs(file, read_groups(file, Contents(), reading.key), reading, limits):
        if group.index not in kept:
            continue
        key, uid, count = kept[group.index]
        if group.pair_key != key:
            raise RunError(f"{shard}: pair {group.index} is {group.pair_key!r}, and {key!r} was scored: run again first")
        members = {suffix: Member(member.name, read_member(file, member)) for suffix, member in group.members.items()}
        if reading.pick:  # of several captions, a trainer would take another one or all of them
            members["txt"] = Member(f"{group.key}.txt", caption_of(file, group, reading, limits).encode())
        yield KeptPair(uid, group.pair_key, members)
        free = (key for i in itertools.count(1) if (key := f"{group.pair_key}-{i}") not in taken)
        for key in itertools.islice(free, count - 1):
            yield KeptPair(uid, key, {suffix: Member(f"{key}.{suffix}", m.data) for suffix, m in members.items()})
