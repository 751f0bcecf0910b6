"""Fingerprints of the data that stages after `embed` read. Names of objects depend on them and on the configuration."""

from typing import NamedTuple

from ecif.batching import choose_batches
from pipeline.config import Config
from pipeline.corpus.batches import batches_of
from pipeline.run_folder.artifacts import Artifacts, fingerprint, names
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting


class Contents(NamedTuple):
    """Fingerprints of what was read."""

    of: dict[str, str]  # by the name of the content, for `artifacts.names`
    shards: dict[str, str]  # of every shard that has usable pairs


def find_artifacts(config: Config, corpus: Dataset, targets: dict[str, Dataset]) -> Artifacts:
    """Where every object of a run is. The corpus and the targets have to be embedded before."""
    found = contents(config, corpus, targets)
    return Artifacts(config.run, names(config, found.of), found.shards)


def sampled(config: Config, done: dict[str, Accounting], limit: int) -> dict[str, list[int]]:
    """Numbers of the sampled batches of each shard, up to `limit` pairs in all; see `choose_batches`."""
    return choose_batches({shard: a.embedded for shard, a in done.items()}, batches_of(config), limit)


def contents(config: Config, corpus: Dataset, targets: dict[str, Dataset]) -> Contents:
    """Fingerprints of what was read.

    The fingerprint of the sample covers only the shards and batches that `choose_batches` takes. A new shard that does not
    change this choice renames neither heads nor directions.
    """
    done = corpus.accounting()
    shards = usable(done)
    of = _asked(config, targets) | {
        "corpus": fingerprint(corpus.fingerprint, sorted(shards.items())),
        "corpus_size": fingerprint(sum(a.embedded for a in done.values())),
    }
    samples = {"sample": config.fit.sample}
    if config.scoring.mode == "forward":
        samples["forward_sample"] = config.scoring.sample
    for name, limit in samples.items():
        chosen = sampled(config, done, limit)
        parts = [[shard, shards[shard], numbers] for shard, numbers in sorted(chosen.items())]
        of[name] = fingerprint(corpus.fingerprint, of["batches"], parts)
    return Contents(of, shards)


def pinned(config: Config, targets: dict[str, Dataset], learned_from: dict[str, str]) -> dict[str, str]:
    """Fingerprints for shards that are scored with what was learned from an earlier corpus: the sample is the one of then."""
    return learned_from | _asked(config, targets)


def usable(done: dict[str, Accounting]) -> dict[str, str]:
    """Fingerprints of the content of every shard that has usable pairs."""
    return {shard: a.content for shard, a in done.items() if a.embedded}


def _asked(config: Config, targets: dict[str, Dataset]) -> dict[str, str]:
    """Fingerprints of the batches, and of every target and question."""
    batches = batches_of(config)
    of = {"batches": fingerprint(config.batching, batches.version, batches.size, batches.seed)}
    for name, target in targets.items():
        pairs = [[shard, a.content] for shard, a in sorted(target.accounting().items()) if a.embedded]
        of[f"target/{name}"] = fingerprint(target.fingerprint, pairs)
        question = config.targets[name].question()
        of[f"question/{name}"] = fingerprint(of[f"target/{name}"], question, config.solve.target_batch, config.loss.question())
    return of
