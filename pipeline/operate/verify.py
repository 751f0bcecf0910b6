"""Check that a run folder is whole: every pair is scored or quarantined, and every object holds what it has to hold."""

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from ecif.copies import COPIES
from pipeline import storage
from pipeline.config import Config
from pipeline.console import say
from pipeline.corpus import sidecar
from pipeline.errors import UserError
from pipeline.operate.check_shard import Checked, CheckShard, Expected, ToCheck, Violation, check_tensors
from pipeline.run_folder import tables
from pipeline.run_folder.artifacts import Artifacts, each_shard
from pipeline.run_folder.changes import changes_since, sources_of
from pipeline.run_folder.columns import IDENTITY, columns, evidence_scores
from pipeline.run_folder.dataset import Dataset, in_folder
from pipeline.run_folder.finished import Checkpoint, Finished, open_run
from pipeline.run_folder.generations import Generation, Generations
from pipeline.run_folder.started import read_started
from pipeline.stages.index import curvature_url
from pipeline.stages.publish import Publication
from pipeline.workers.cluster import session
from pipeline.workers.shards import in_tasks

FEW = 256  # shards that threads of this process check sooner than Ray starts

PARTS = ["positive", "negative"]  # of a pair's influence
TABLES: dict[str, Callable[[Config], list[str]]] = {  # columns of each kind of table, beside `index`
    "pairs": lambda config: [*IDENTITY, *(s.name for s in evidence_scores(config)), *(c.name for c in COPIES)],
    "influence": lambda config: [*PARTS, "agreement", "near"],
    "correction": lambda config: [*PARTS, "leverage"],
    "column": lambda config: [],
    "forward_influence": lambda config: PARTS,
    "index": lambda config: ["positive", "positive_scale", "negative", "negative_scale"],
    "self_influence": lambda config: ["self_influence", "gram_positive", "gram_mixed", "gram_negative"],
}


def verify(folder: str, report: Callable[[Violation], None]) -> dict[str, Checked]:
    """Check every object of the run that was started last in a folder.

    Args:
        folder: of the run.
        report: called with each violation as it is found.

    Returns:
        Counts of what was checked, by dataset, and by checkpoint if there are several.

    Raises:
        UserError: there is no run, it is not finished, or its corpus is not where it was.
    """
    sound = True

    def note(violation: Violation) -> None:
        nonlocal sound
        sound = False
        report(violation)

    started = read_started(folder)
    generations = Generations(folder)
    generation = generations.last()
    if generation is None and not storage.exists(storage.join(folder, "run.json")):
        raise UserError(f"{folder}: the run is not finished; `ecif status {folder}` says how far it is")
    finished = open_run(folder)
    if _what_counts(finished.config) != _what_counts(started.config):
        if generation is not None:
            raise UserError(f"{folder}: nights have begun to score anew, as the configuration changed: verify when they have")
        note(Violation(storage.join(folder, "run.json"), "is of another configuration than the run that was started last"))
    checked = {}
    datasets_of = started.datasets()
    if generation is not None:  # what is new, changed or gone since waits for the next night
        same = changes_since(generation, sources_of(datasets_of[0]["corpus"])).same
        datasets_of = [datasets | {"corpus": datasets["corpus"].of(same, few=False)} for datasets in datasets_of]
        for violation in _gone(generations, generation, same):
            note(violation)
    of_checkpoints = list(zip(finished.checkpoints, datasets_of, strict=False))
    with _checkers(max(len(datasets["corpus"].shards) for _, datasets in of_checkpoints)) as checkers:
        for i, (checkpoint, datasets) in enumerate(of_checkpoints):
            artifacts = checkpoint.artifacts(folder)
            for name, dataset in datasets.items():
                each = f"{name}, checkpoint {i}" if len(finished.checkpoints) > 1 else name
                check = _check(finished, artifacts if name == "corpus" else None, dataset, note)
                total = Checked()
                for done, violations in checkers(check, [ToCheck(s, dataset.uids_from(s.name)) for s in dataset.shards]):
                    total = Checked(*map(operator.add, total, done))
                    for violation in violations:
                        note(violation)
                checked[each] = total
            urls = [artifacts.url(key) for key in artifacts.names if not each_shard(key)]
            labelled = [name for name, target in finished.config.targets.items() if target.kind.labelled]
            urls += [datasets[f"target {name}"].prompts_url() for name in labelled]
            for violations in storage.in_threads(_tensors, urls):
                for violation in violations:
                    note(violation)
    if sound:  # else the accounting itself may be wrong
        for violation in _outdated(finished, [(one, datasets["corpus"]) for one, datasets in of_checkpoints], generation):
            report(violation)
    return checked


def _gone(generations: Generations, generation: Generation, same: list[str]) -> list[Violation]:
    """Columns of shards that are not what they were, where they are not as the generation was committed."""
    others = [generation.files[shard] for shard in sorted(generation.files.keys() - {*same})]
    if not others:
        return []
    say(f"{len(others)} of {len(generation.files)} shards have changed or are gone since: their columns are only looked for")
    there = generations.sizes()
    urls = {storage.canonical(generations.url(file)): file.size for file in others}
    return [Violation(url, "is not there as it was committed") for url, size in urls.items() if there.get(url) != size]


def _outdated(
    finished: Finished, of_checkpoints: list[tuple[Checkpoint, Dataset]], generation: Generation | None
) -> list[Violation]:
    """The published tables that are of another run, or of an earlier content of their shard."""
    artifacts = []
    for checkpoint, corpus in of_checkpoints:
        shards = {shard: done.content for shard, done in corpus.accounting().items() if done.embedded}
        artifacts.append(checkpoint.artifacts(finished.folder)._replace(shards=shards))
    publication = Publication(finished.config, artifacts, of_checkpoints[0][1].sidecars)
    if generation is not None:
        names = list(artifacts[0].shards)
        stamped = storage.in_threads(lambda shard: tables.read_run(finished.url(shard)), names)
        asked = ((generation.files[shard].run, publication.of_shard(shard)) for shard in names)
        old = [shard for shard, is_of, wanted in zip(names, stamped, asked, strict=True) if is_of != wanted]
        return [Violation(finished.url(shard), "is of another generation, or of the shard as it was") for shard in old]
    written, wrong = (
        publication.written().current,
        "is of another run, or of the shard as it was; the same `ecif run` writes it anew",
    )
    outdated = (shard for shard in artifacts[0].shards if written.get(shard) != publication.of_shard(shard))
    return [Violation(publication.url(shard), wrong) for shard in outdated]


def _what_counts(config: Config) -> dict[str, Any]:
    """The configuration without the keys that change no result."""
    budgets = {"max_bad_fraction", "max_bad_fraction_of_shard"}
    return config.model_dump(exclude={"run": True, "workers": True, "nightly": True, "prices": True, "embed": budgets})


class _Checkers(Protocol):
    """`map` of a check over shards, in their order."""

    def __call__(self, check: CheckShard, shards: list[ToCheck], /) -> Iterable[tuple[Checked, list[Violation]]]: ...


@contextmanager
def _checkers(shards: int) -> Iterator[_Checkers]:
    """Threads of this process, or tasks on the cluster if there are many shards. A thread holds one table in memory."""
    if shards <= FEW:
        yield storage.in_threads
        return
    with session(None) as resources:
        yield partial(in_tasks, "verify", resources=resources)


def _check(
    finished: Finished, artifacts: Artifacts | None, dataset: Dataset, report: Callable[[Violation], None]
) -> CheckShard:
    """The check of a dataset's shards. Published tables that are of no shard are reported."""
    if artifacts is None:  # of a target
        return CheckShard(dataset.places(), [], [])
    names = {shard.name for shard in dataset.shards}
    published = {} if finished.files else in_folder(finished.table, ".parquet")
    for shard, item in sorted(published.items()):
        if shard not in names:
            report(Violation(item.url, "is of no shard of the corpus"))
    return CheckShard(dataset.places(), _expected(finished, artifacts), _beside(artifacts))


def _expected(finished: Finished, artifacts: Artifacts) -> list[Expected]:
    """Every table that a shard of the corpus has to have: those of the stages, and the published one."""
    config, found = finished.config, []
    for key in artifacts.names:
        kind, _, of = key.partition("/")
        if each_shard(key) and kind != "scores":
            own = [of] if kind == "column" else []
            found.append(Expected(_table_of(artifacts, key), [*TABLES[kind](config), *own]))
    carried = [sidecar.PREFIX + name for name in config.corpus.sidecar]
    newest = [*IDENTITY, *(column.name for column in columns(config)), *carried]
    return [*found, Expected(lambda shard, content: finished.url(shard), newest)]


def _table_of(artifacts: Artifacts, key: str) -> Callable[[str, str], str]:
    return lambda shard, content: artifacts._replace(shards={shard: content}).table(key, shard)


def _beside(artifacts: Artifacts) -> list[Callable[[str, str], str]]:
    """Where a shard's part of the index's curvature has to be; empty without an index."""
    if "index" not in artifacts.names:
        return []
    return [lambda shard, content: curvature_url(artifacts._replace(shards={shard: content}), shard)]


def _tensors(url: str) -> list[Violation]:
    found: list[Violation] = []
    check_tensors(url, found)
    return found
