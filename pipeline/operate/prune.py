"""Delete what no kept generation, and not the run that was started last, is made of.

Only objects whose names a run gives are ever deleted. Whatever else is in the folder stays.
"""

import re
from contextlib import nullcontext
from typing import NamedTuple

from pipeline import storage
from pipeline.errors import UserError
from pipeline.run_folder.artifacts import KINDS, each_shard
from pipeline.run_folder.contents import usable
from pipeline.run_folder.finished import open_run
from pipeline.run_folder.generations import COLUMNS, TABLE, Generation, Generations
from pipeline.run_folder.reference import read_pending, reference_from
from pipeline.run_folder.started import read_started
from pipeline.storage.lease import hold_folder

FEATURES = ("features", "shards", "quarantine", "accounting", "prompts")
NAMED = re.compile(r"(?P<name>[0-9a-f]{16})(?:\.safetensors|/(?P<shard>.+)\.(?P<content>[0-9a-f]{16})\.[.\w]+)")


class Pruned(NamedTuple):
    """What was deleted, or would be."""

    objects: list[storage.Object]
    kept: list[int]  # numbers of the generations that are kept

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(item.size for item in self.objects)


def prune(run: str, keep: int, dry_run: bool) -> Pruned:
    """Delete what is left of earlier configurations, of earlier contents of shards, and of all but some generations.

    Args:
        run: folder of the run; it need not have generations.
        keep: number of generations to keep, the newest ones.
        dry_run: delete nothing.

    Raises:
        UserError: there is no run, its corpus can't be listed, or a run is at work in the folder.
    """
    if keep < 1:
        raise UserError(f"--keep {keep}: at least the last generation is kept")
    read_started(run)  # before anything is written
    with nullcontext() if dry_run else hold_folder(run):
        generations = Generations(run)
        numbers = [one.number for one in generations.history()][:keep]
        kept = [generations.at(number) for number in numbers]
        needed = _Needed(run, kept)
        base = storage.canonical(run) + "/"
        gone = [item for item in storage.listing(run, "") if not needed.has(item.url.removeprefix(base))]
        if not dry_run:
            for item in gone:
                storage.delete(item.url)
        return Pruned(gone, numbers)


class _Needed:
    """What of a run folder is needed, by the names of objects below it.

    Raises:
        UserError: there is no run, or its corpus can't be listed.
    """

    def __init__(self, run: str, kept: list[Generation]):
        started = read_started(run)
        each = started.datasets()
        self.files = {file.path for generation in kept for file in generation.files.values()}
        references = [reference_from(generation.record["reference"]) for generation in kept]
        references += [begun] if (begun := read_pending(run)) else []
        checkpoints = [one.record for reference in references for one in reference.checkpoints]
        if not kept and storage.exists(storage.join(run, "run.json")):
            checkpoints += open_run(run).checkpoints
        names = [checkpoint.names for checkpoint in checkpoints]
        self.shards: set[str] = {shard for generation in kept for shard in generation.files}
        self.contents: set[tuple[str, str]] = set()  # shard and content, of what is embedded now
        self.features = {("", checkpoint.features) for checkpoint in checkpoints}  # of a target, or of the corpus without one
        for datasets in each:
            if artifacts := started.artifacts(datasets):  # what a run that was killed has made
                names.append(artifacts.names)
            self.contents |= set(usable(datasets["corpus"].accounting()).items())
            self.shards |= {shard.name for shard in datasets["corpus"].shards}
            self.features |= {(name.removeprefix("target "), d.fingerprint) for name, d in datasets.items() if name != "corpus"}
            self.features.add(("", datasets["corpus"].fingerprint))
        self.names = {(key, name) for of in names for key, name in of.items()}

    def has(self, path: str) -> bool:
        """Whether an object is needed, or is none of a run's."""
        first, _, rest = path.partition("/")
        if first == TABLE:
            return not rest.startswith(f"{COLUMNS}/") or rest in self.files
        if first == "targets":
            target, _, rest = rest.partition("/")
            kind, _, rest = rest.partition("/")
            return kind not in FEATURES or (target, re.split(r"[/.]", rest, maxsplit=1)[0]) in self.features
        if first in FEATURES:
            return self._has_features(first, rest)
        kind, _, rest = path.partition("/")
        if kind not in KINDS or KINDS[kind].stage in ("embed", "publish"):
            return True
        of = ""
        if KINDS[kind].each and KINDS[kind].each[0] != "shard":  # there is one for each target, or for each column
            of, _, rest = rest.partition("/")
        key, match = f"{kind}/{of}" if of else kind, NAMED.fullmatch(rest)
        if match is None:
            return True
        if (key, match["name"]) not in self.names:
            return False
        return not each_shard(key) or (match["shard"], match["content"]) in self.contents

    def _has_features(self, kind: str, rest: str) -> bool:
        fingerprint, _, shard = rest.partition("/")
        if kind in ("accounting", "prompts"):
            return rest.startswith("latest.") or ("", rest.partition(".")[0]) in self.features
        shard = shard.rpartition("/")[0] if kind == "features" else shard.rpartition(".")[0]
        return ("", fingerprint) in self.features and shard in self.shards
