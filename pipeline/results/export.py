"""Stage `export`: the selected pairs as WebDataset shards that existing trainers take."""

import io
import itertools
import json
import os
import tarfile
import tempfile
from collections import Counter
from typing import Any

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.shards import find
from pipeline.corpus.tar import Contents, groups, read_member
from pipeline.errors import RunError, UserError
from pipeline.results.select import read_scores, read_subset
from pipeline.run import load_run
from pipeline.run_folder import tables
from pipeline.run_folder.dataset import Dataset
from pipeline.workers.cluster import session
from pipeline.workers.progress import Stage
from pipeline.workers.shards import as_tasks


def export(run: str, subset: str, out: str) -> dict[str, int]:
    """Copy the pairs of a subset, shard by shard.

    Members are copied byte for byte under their own keys, so that everything joined by uid or key still joins. Shards are
    numbered without gaps, none is empty, and the same input gives the same bytes.

    Args:
        run: folder of a finished run.
        subset: DataComp subset file; a uid that is there twice is written twice, the copy with `-1` after its key,
            or the next number that is free.
        out: folder of the new shards.

    Returns:
        {"shards": ..., "pairs": ...}.

    Raises:
        UserError: an empty subset, uids that the run has not scored, or an `out` that has other shards in it.
        RunError: a corpus that is not what the run scored.
    """
    facts = load_run(run)
    config = Config(**facts["config"])
    wanted = read_subset(subset)
    if not wanted:
        raise UserError(f"{subset} is empty: there is nothing to export")
    kept = _kept_by_shard(run, wanted)
    corpus = find(config.corpus.shards)
    shards = [s for s in corpus if s.name in kept]
    if changed := kept.keys() - Dataset(run, facts["features"], shards, config.corpus.caption).accounting().keys():
        raise RunError(f"{min(changed)}: gone or changed since the run scored it; run again first")
    names = {s.name: f"{i:05d}" for i, s in enumerate(shards)}
    there = {item.url for item in storage.listing(out, ".tar")}
    foreign = {url.rsplit("/", 1)[-1].removesuffix(".tar") for url in there} - set(names.values())
    foreign |= {s.name for s in corpus if s.source.url in there}  # or the corpus would be written over
    if foreign:
        raise UserError(f"{out} has other shards in it ({sorted(foreign)[0]}.tar): export to an empty folder")
    sizes: dict[str, int] = {}
    with session(config.workers), Stage("export", sum(s.source.size for s in shards)) as progress:
        rows = [
            {
                "shard": s.name,
                **s.source._asdict(),
                "out": storage.join(out, names[s.name]),
                "kept": json.dumps(list(kept[s.name].items())),
            }
            for s in shards
        ]
        for row in as_tasks(rows).map(_copy, num_cpus=1).iter_rows():
            sizes[f"{names[row['shard']]}.tar"] = row["pairs"]
            progress.advance(row["bytes"])
            if row["pairs"] != sum(kept[row["shard"]].values()):
                raise RunError(
                    f"{row['shard']}: {row['pairs']} of {sum(kept[row['shard']].values())} pairs found; has it changed?"
                )
    total = sum(sizes.values())
    storage.write_bytes(storage.join(out, "sizes.json"), tables.json_bytes(sizes))
    meta = {"run": run, "subset": subset, "pairs": total, "shards": len(sizes)}
    storage.write_bytes(storage.join(out, "meta.json"), tables.json_bytes(meta))
    return {"shards": len(sizes), "pairs": total}


def _kept_by_shard(run: str, wanted: Counter[str]) -> dict[str, dict[int, int]]:
    """For each shard with kept pairs: how often to write the pair at each index."""
    table = read_scores(run, ["shard", "index", "uid"])
    kept: dict[str, dict[int, int]] = {}
    known = set()
    for shard, index, uid in zip(*(table[c].to_pylist() for c in ("shard", "index", "uid")), strict=True):
        # A uid that the corpus holds twice is one pair: its first copy stands for it.
        if uid in wanted and uid not in known:
            known.add(uid)
            kept.setdefault(shard, {})[index] = wanted[uid]
    if missing := wanted.keys() - known:
        raise UserError(f"{len(missing)} uids of the subset are not in the run, such as {min(missing)}")
    return kept


def _copy(row: dict[str, Any]) -> dict[str, Any]:
    """Write the kept pairs of one shard."""
    kept: dict[int, int] = dict(json.loads(row["kept"]))
    pairs = 0
    with (
        storage.local_copy(storage.Object(row["url"], row["size"], row["etag"]), storage.ATTEMPTS) as file,
        tempfile.TemporaryDirectory() as scratch,
    ):
        local = os.path.join(scratch, "shard.tar")
        with tarfile.open(local, "w", format=tarfile.PAX_FORMAT) as tar:
            taken = {group.key for group in groups(file, Contents())}
            file.seek(0)
            for group in groups(file, Contents()):
                free = (f"{group.key}-{i}" for i in itertools.count(1) if f"{group.key}-{i}" not in taken)
                for copy in range(kept.get(group.index, 0)):
                    pairs += 1
                    key = next(free) if copy else group.key
                    for suffix, member in group.members.items():
                        name = tarfile.TarInfo(f"{key}.{suffix}" if copy else member.name)
                        name.size = member.size  # everything else stays at its default, so that bytes repeat
                        tar.addfile(name, io.BytesIO(read_member(file, member)))
        storage.upload(local, f"{row['out']}.tar")
    storage.write_bytes(f"{row['out']}_stats.json", tables.json_bytes({"successes": pairs}))
    return {"shard": row["shard"], "bytes": row["size"], "pairs": pairs}
