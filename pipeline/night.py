"""The recipe of a night: embed and score what is new, with what was learned before, and commit it as a generation.

The first night learns from the whole corpus, as a run does. Later ones use its heads, directions and filters until the
configuration says that they are learned anew. Then every shard is scored anew, over as many nights as that takes, and readers
see the generation before until all of it is there.
"""

import logging
import time
from collections import Counter
from typing import Any, Literal, NamedTuple

from pipeline.config import Config
from pipeline.console import say
from pipeline.errors import RunError, UserError
from pipeline.inputs import Given, load_each, settle_each
from pipeline.learn import embed_given, learn
from pipeline.run_folder.artifacts import fingerprint, keys_of
from pipeline.run_folder.changes import Changes, changes_since, sources_of
from pipeline.run_folder.contents import contents, find_artifacts
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.finished import Checkpoint, Finished
from pipeline.run_folder.generations import File, Generation, Generations, said, unknown_types
from pipeline.run_folder.reference import (
    Learned,
    Reference,
    delete_pending,
    learned_with,
    read_pending,
    reference_from,
    write_pending,
)
from pipeline.run_folder.started import start
from pipeline.stages.drift import Drifted, measure_drift, unusable
from pipeline.stages.publish import Publication, publish_files
from pipeline.stages.score import score
from pipeline.storage.lease import hold_folder
from pipeline.workers import deadline, metrics
from pipeline.workers.cluster import Resources, session
from pipeline.workers.process import as_found
from pipeline.workers.run import Clock, Run
from pipeline.workers.shards import missing_tables

State = Literal["done", "nothing new", "deadline", "drift"]


class Night(NamedTuple):
    """What a night did."""

    state: State
    generation: Generation | None  # the last one that there is now
    committed: int  # generations of this night


@as_found()
def night(config: Config) -> Night:
    """Embed and score what is new, changed or gone since the last generation, and commit the next one.

    The same call goes on where an earlier one was killed.

    Raises:
        UserError: the corpus, the model or a target can't be read, or another run holds the folder.
        RunError: a stage failed, or another run has taken over the folder.
    """
    began, hours = time.monotonic(), config.nightly.deadline_hours
    for asked, key in ((config.index is not None, "index"), (config.scoring.mode == "forward", "scoring.mode: forward")):
        if asked:
            raise UserError(f"{key}: nights do not know it, because it takes the whole corpus: leave it out, or use `ecif run`")
    each = load_each(config)
    beside = each[0].inputs.corpus.sidecars
    if unknown := unknown_types(beside.schema) if beside else []:
        raise UserError(f"corpus.sidecar: nights carry no {unknown[0]}, which a Delta table does not know: leave it out")
    with hold_folder(config.run), session(config.workers, config.device) as resources:
        config, each = settle_each(config, each, resources)
        start(config, [read.datasets() for _, read in each])
        return _Night(config, each, resources, began + 3600 * hours if hours else None).run()


class _Night:
    """One night, while its run folder is held.

    Args:
        config: of the run.
        each: the same with each checkpoint of the model, and what is read.
        resources: of the cluster.
        end: the deadline, of time.monotonic; None without one.
    """

    def __init__(self, config: Config, each: list[Given], resources: Resources, end: float | None):
        self.config, self.each, self.resources, self.end = config, each, resources, end
        self.clock, self.generations, self.committed = Clock(), Generations(config.run), 0
        self.corpora = [read.corpus for _, read in each]
        self.sources = sources_of(self.corpora[0])
        self.last = self.generations.last()

    def run(self) -> Night:
        """Bring the last generation up to date, then renew it if that is due."""
        reference = reference_from(self.last.record["reference"]) if self.last else None
        changes = changes_since(self.last, self.sources)
        fresh, parts = [*changes.new, *changes.changed], self.corpora
        if reference and self._has_features_of(reference):
            old = sum(self.last.files[shard].rows for shard in changes.same if shard in self.last.files) if self.last else 0
            parts = [corpus.of(fresh, others=old) for corpus in self.corpora]
        with deadline.until(self.end):
            late = not self._embed(parts)
        if late:  # under each checkpoint other shards may be left
            done = set.intersection(*({*corpus.accounting()} for corpus in parts))
            parts = [corpus.of(sorted(done)) for corpus in parts]
        due, drifted = True, False
        if reference and self._is_asked_for(reference):
            due = self._is_due(reference)
            if parts[0].accounting() or changes.gone:
                drifted = self._add(reference, parts, changes)
                due = due or (self.last is not None and self.last.record["due"])
        elif reference:
            say("the configuration, the model or a target has changed: every shard is scored anew")
        if due and not late:
            with deadline.until(self.end):
                late = not self._renew()
        state: State = "deadline" if late else "drift" if drifted and not due else "done" if self.committed else "nothing new"
        return Night(state, self.last, self.committed)

    def _has_features_of(self, reference: Reference) -> bool:
        return [one.record.features for one in reference.checkpoints] == [corpus.fingerprint for corpus in self.corpora]

    def _is_asked_for(self, reference: Reference) -> bool:
        """Whether the configuration and the targets ask for the columns of a reference."""
        if not self._has_features_of(reference):
            return False
        each = zip(reference.checkpoints, self.each, strict=True)
        return all(one.is_asked_for(given.config, given.inputs.targets, given.inputs.corpus) for one, given in each)

    def _is_due(self, reference: Reference) -> bool:
        """Whether to learn anew: that was begun, a bound of drift was passed, or what was learned has served long enough."""
        assert self.last
        every, begun = self.config.nightly.renew.every, read_pending(self.config.run)
        served = self.last.number - reference.since  # generations that were added to the one that it was learned for
        if begun and begun.checkpoints == reference.checkpoints and not served:  # killed when all but this was done
            delete_pending(self.config.run)
            begun = None
        ripe = every is not None and served >= every
        return ripe or self.last.record["due"] or (begun is not None and self._is_asked_for(begun))

    def _embed(self, corpora: list[Dataset]) -> bool:
        """Embed corpora, or parts of them, with each checkpoint. False if shards are left at the deadline."""
        with self.clock.stage("embed"):
            for given, corpus in zip(self.each, corpora, strict=True):
                embed_given(given, corpus, self.resources)
        read = [*corpora, *(target for _, inputs in self.each for target in inputs.targets.values())]
        return all(len(dataset.accounting()) == len(dataset.shards) for dataset in read)

    def _add(self, reference: Reference, parts: list[Dataset], changes: Changes) -> bool:
        """Score new and changed shards, and commit them beside those that are the same. Whether a bound of drift was passed."""
        assert self.last
        done = parts[0].accounting()
        left = [shard for shard in changes.changed if shard not in done]  # as they were, until a night comes to them
        files = {shard: self.last.files[shard] for shard in (*changes.same, *left) if shard in self.last.files}
        scored = self._columns(reference, parts) or {}
        drifted = self._drift(reference, parts[0], scored)
        self._commit(reference, files | scored, parts, changes, drifted)
        return bool(drifted.get("beyond"))

    def _drift(self, reference: Reference, part: Dataset, scored: dict[str, File]) -> dict[str, Any]:
        """How the pairs of this night differ from what was learned from. Empty if it has none."""
        if not part.accounting():
            return {}
        found = Drifted()
        if scored:
            given = self.each[0]
            this = Run(given.config, self.resources, reference.checkpoints[0].artifacts(self.config.run, part))
            published = {shard: self.generations.url(file) for shard, file in scored.items()}
            with self.clock.stage("drift"):
                found = measure_drift(this, given.inputs.model.heads, part, given.inputs.targets, published)
        found = found._replace(measures=found.measures | {"quarantined": unusable(part.accounting(), reference.unusable)})
        beyond = found.beyond(self.config.nightly.drift)
        for line in beyond:
            say(f"warning: drift: {line}; nightly.renew decides whether that learns anew", logging.WARNING)
        return found.facts() | {"beyond": beyond}

    def _renew(self) -> bool:
        """Learn anew and score every shard. False if shards are left at the deadline: the next night goes on."""
        if not self._embed(self.corpora) or deadline.passed():
            return False
        reference, number = read_pending(self.config.run), self.last.number + 1 if self.last else 0
        if reference is None or not self._is_asked_for(reference):
            reference = self._learn()
        files = self._columns(reference, self.corpora)
        if files is None:
            return False
        self._commit(reference._replace(since=number), files, self.corpora, changes_since(self.last, self.sources))
        delete_pending(self.config.run)
        return True

    def _learn(self) -> Reference:
        learned = []
        for given in self.each:
            config, (_, corpus, targets) = given
            this = Run(config, self.resources, find_artifacts(config, corpus, targets))
            found = learn(this, given.inputs, self.clock)
            record = Checkpoint(corpus.fingerprint, this.artifacts.names, found.fit, found.facts)
            learned.append(Learned(record, contents(config, corpus, targets).of | learned_with(config, corpus)))
        done = self.corpora[0].accounting().values()
        unusable = 1 - sum(a.embedded for a in done) / max(1, sum(a.pairs for a in done))
        reference = Reference(learned, 0, unusable)
        write_pending(self.config.run, reference)
        return reference

    def _columns(self, reference: Reference, corpora: list[Dataset]) -> dict[str, File] | None:
        """The files of every shard with usable pairs. None if shards are left at the deadline."""
        each = [one.artifacts(self.config.run, corpus) for one, corpus in zip(reference.checkpoints, corpora, strict=True)]
        with self.clock.stage("score"):
            for (config, (model, _, targets)), artifacts, corpus in zip(self.each, each, corpora, strict=True):
                score(Run(config, self.resources, artifacts), model.heads, corpus, targets)
                if deadline.passed() and missing_tables(artifacts, keys_of("score", config)):
                    return None
        publication = Publication(self.config, each, corpora[0].sidecars, self.sources)
        with self.clock.stage("publish"):
            pairs = {shard: a.embedded for shard, a in corpora[0].accounting().items() if a.embedded}
            return publish_files(publication, pairs, self.resources)

    def _commit(
        self,
        reference: Reference,
        files: dict[str, File],
        scored: list[Dataset],
        changes: Changes,
        drift: dict[str, Any] | None = None,
    ) -> None:
        """Commit a generation.

        Args:
            reference: what its columns were computed with.
            files: all of it.
            scored: the shards that this night has scored, with each checkpoint.
            changes: since the last generation.
            drift: see `_drift`.
        """
        if not files:
            raise RunError("no shard of the corpus has usable pairs: see the quarantine tables")
        done, number = scored[0].accounting(), self.last.number + 1 if self.last else 0
        empty = {shard: self.sources[shard] for shard, a in done.items() if not a.embedded}
        if self.last:
            same = {*changes.same} - done.keys()
            empty |= {shard: source for shard, source in self.last.record["empty"].items() if shard in same}
        id_ = fingerprint([files[shard].path for shard in sorted(files)])
        record: dict[str, Any] = {
            "run": Finished(self.config.run, self.config, id_, [one.record for one in reference.checkpoints]).facts(),
            "reference": reference.facts(),
            "empty": empty,
            "due": self._stays_due(reference, number, drift),
            "night": self._did(files, scored, changes) | {"drift": drift or {}},
        }
        self.generations.commit(files, record, self.last)
        self.last, self.committed = self.generations.last(), self.committed + 1
        metrics.night(number, record["night"])
        say(said(number, record))

    def _stays_due(self, reference: Reference, number: int, drift: dict[str, Any] | None) -> bool:
        """Whether a renewal is due after this generation: drift asked for it, now or before, and it is none itself."""
        asked = self.config.nightly.renew.drift and bool(drift and drift["beyond"])
        return reference.since != number and (asked or bool(self.last and self.last.record["due"]))

    def _did(self, files: dict[str, File], scored: list[Dataset], changes: Changes) -> dict[str, Any]:
        """What a night did, for people and for the record."""
        done, device = scored[0].accounting(), self.resources.device_type
        hours, price = sum(self.clock.seconds.values()) * self.resources.workers / 3600, self.config.prices.hour(device)
        bad = Counter[str]()
        for a in done.values():
            bad.update(a.quarantined)
        return {
            "new": len([shard for shard in changes.new if shard in done]),
            "changed": len([shard for shard in changes.changed if shard in done]),
            "gone": len(changes.gone),
            "left": len([shard for shard in (*changes.new, *changes.changed) if shard not in done]),
            "shards": len(files),
            "pairs": sum(file.rows for file in files.values()),
            "scored": sum(a.embedded for a in done.values()),
            "quarantined": dict(sorted(bad.items())),
            "bytes": sum(a.size for a in done.values()),  # of the tars that were read
            "stored": sum(file.size for file in files.values()),
            "workers": "GPU" if device == "cuda" else "core",
            "worker_hours": round(hours, 4),
            "price": None if price is None else round(hours * price, 4),  # of these hours
            "seconds": {stage: round(seconds, 1) for stage, seconds in self.clock.seconds.items()},
        }
