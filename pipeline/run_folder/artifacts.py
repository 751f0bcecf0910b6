"""What a run writes, and under which names: the one list that run, status, verify, plan and the docs read.

The name of an object is a fingerprint of everything that the object depends on: keys of the configuration, other objects, and
the content of what was read. Every name is known after `embed`. An object that exists under its name is complete, so a run
computes only the objects that are missing. A changed input gives an object another name. An input that an object does not
depend on never renames it.
"""

import hashlib
import json
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline import storage
from pipeline.config import Config
from pipeline.kinds import OfKind
from pipeline.run_folder.columns import evidence_scores, requested_columns

FITS = ("fit.folds", "fit.epochs", "fit.learning_rate", "fit.pull", "fit.checkpoints", "fit.train_logit_scale")
FORWARD = ("scoring.parameters", "scoring.epochs", "scoring.learning_rate")


class Kind(NamedTuple):
    """One kind of object that a run writes.

    `made_of` lists other kinds, and contents that `run_folder.contents` fingerprints: `batches` (which pairs of a shard share a
    softmax), `sample` and `forward_sample` (the pairs that are fitted on), `target` (the pairs of a target), `question` (the
    pairs of a target and the loss on them), `corpus` (every shard) and `corpus_size` (the number of its usable pairs).
    """

    stage: str  # its line in progress and status
    says: str  # one line for the docs
    version: int = 1  # raise it when the same inputs give other bytes: this kind and what follows are redone, nothing else
    reads: tuple[str, ...] = ()  # keys of the configuration
    made_of: tuple[str, ...] = ()
    each: tuple[str, ...] = ()  # there is one object for each of these: `target`, `column`, `shard`
    asked: Callable[[Config], bool] = lambda config: True


def _order_two(config: Config) -> bool:
    return config.score.order == 2


def _index(config: Config) -> bool:
    return config.index is not None


def _forward(config: Config) -> bool:
    return config.scoring.mode == "forward"


# In the order in which a run makes them.
KINDS: dict[str, Kind] = {
    "features": Kind(
        "embed",
        "unit-norm trunk features in fp16 and a hash of the image's bytes, a part at a time",
        version=4,
        each=("shard",),
    ),
    "prompts": Kind(
        "embed",
        "features of a zero-shot target's prompts [classes, templates, d_t]",
        each=("target",),
        asked=lambda config: any(target.kind.labelled for target in config.targets.values()),
    ),
    "copies": Kind(
        "fit",
        "which sampled pairs are copies of each other, their folds, and the features that find copies of other pairs",
        reads=("fit.folds", "seed"),
        made_of=("sample",),
    ),
    "fit_choice": Kind(
        "fit",
        "learning rate, length and pull of every fit, and what each candidate lost on held-out pairs",
        version=2,
        reads=("loss", "batch_size", "seed", *FITS),
        made_of=("copies", "sample"),
    ),
    "heads": Kind(
        "fit",
        "fitted heads: on all of the sample, and without each fold; each at its checkpoints",
        reads=("loss", "batch_size", "seed", "fit.folds", "fit.seeds", "fit.checkpoints", "fit.train_logit_scale"),
        made_of=("fit_choice", "copies", "sample"),
    ),
    "evidence": Kind(
        "solve",
        "the sampled pairs' scores, with their own and with planted captions; features of up to 16,384 of them",
        version=4,
        reads=("repeats", "seed"),
        made_of=("heads", "copies"),
    ),
    "directions": Kind(
        "solve",
        "H^-1 grad L_T for each set of heads, the damping, pairs of the target, and the sampled pairs' scores on it",
        version=7,
        reads=("solve.iterations", "solve.dampings", "solve.calibration_refits", "score.negative", "repeats", "seed"),
        made_of=("heads", "question"),
        each=("target",),
    ),
    "misalignment": Kind(
        "solve",
        "what turns a pair's evidence into the probability that it is misaligned",
        version=3,
        made_of=("evidence", "directions"),
    ),
    "curvature": Kind(
        "order 2",
        "the sample's curvature without each fold, in a projection of the heads' gradients",
        reads=("score.order_rank",),
        made_of=("heads",),
        asked=_order_two,
    ),
    "second_order": Kind(
        "order 2",
        "the target's gradient and curvature in that projection",
        made_of=("curvature", "directions"),
        each=("target",),
        asked=_order_two,
    ),
    "filter": Kind(
        "filter",
        "how many pairs are kept, what each candidate lost, and what ranks pairs",
        version=6,
        reads=("filter", "seed"),
        made_of=("evidence", "directions"),
        each=("target",),
        asked=lambda config: config.filter is not None,
    ),
    "pairs": Kind(
        "score",
        "which pair each row is, its batch and fold, the scores that misalignment is learned from, and numbers of copies",
        version=3,
        reads=("repeats",),
        made_of=("batches", "evidence", "copies"),
        each=("shard",),
    ),
    "influence": Kind(
        "score",
        "influence on the target, as a positive and as a negative, agreement with its pairs, and nearness to its captions",
        version=5,
        reads=("repeats", "score.negative"),
        made_of=("batches", "copies", "directions"),
        each=("target", "shard"),
    ),
    "correction": Kind(
        "score",
        "what the second order adds to both parts of the influence, and the pair's leverage",
        reads=("repeats", "score.negative"),
        made_of=("batches", "copies", "second_order"),
        each=("target", "shard"),
        asked=_order_two,
    ),
    "column": Kind(
        "score",
        "a column of `score.columns`",
        reads=("repeats",),
        made_of=("batches", "copies", "evidence", "target"),
        each=("column", "shard"),
        asked=lambda config: bool(config.score.columns),
    ),
    "parameters": Kind(
        "forward fit",
        "forward mode: the fitted parameters, by name",
        reads=("batch_size", "seed", *FORWARD),
        made_of=("forward_sample",),
        asked=lambda config: _forward(config) and config.scoring.epochs > 0,
    ),
    "forward_directions": Kind(
        "forward solve",
        "forward mode: one direction over the chosen parameters",
        reads=(*FORWARD, "scoring.damping", "scoring.iterations", "scoring.tolerance"),
        made_of=("parameters", "forward_sample", "corpus_size", "question", "directions"),
        each=("target",),
        asked=_forward,
    ),
    "forward_influence": Kind(
        "forward score",
        "forward mode: influence on the target through the chosen parameters",
        version=2,
        made_of=("batches", "forward_directions"),
        each=("target", "shard"),
        asked=_forward,
    ),
    "scores": Kind(
        "publish",
        "the columns of the run that finished last",
        reads=("corpus.sidecar",),
        made_of=("pairs", "influence", "correction", "column", "misalignment", "filter", "forward_influence"),
        each=("shard",),
    ),
    "index_projection": Kind(
        "index",
        "the projection of the heads' gradients",
        reads=("index.rank", "index.projection", "seed"),
        made_of=("heads",),
        asked=_index,
    ),
    "index": Kind(
        "index",
        "both parts of each pair's projected gradient, and the shard's part of the curvature",
        version=2,
        reads=("score.negative",),
        made_of=("batches", "index_projection"),
        each=("shard",),
        asked=_index,
    ),
    "index_curvature": Kind(
        "index", "the projected curvature of every pair, exactly summed", made_of=("index", "corpus"), asked=_index
    ),
    "self_influence": Kind(
        "index",
        "self-influence, and the Gram matrix of both parts' parameter changes",
        reads=("index.damping",),
        made_of=("index_curvature",),
        each=("shard",),
        asked=_index,
    ),
}


def fingerprint(*parts: Any) -> str:
    """A hash, in 16 hex digits, of plain values, lists, dictionaries and sections of the configuration.

    Raises:
        TypeError: a part has another type. Its text might not show everything that it holds.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def names(config: Config, contents: dict[str, str]) -> dict[str, str]:
    """Names of all objects that a run writes after `embed`, by key: `<kind>`, `<kind>/<target>` or `<kind>/<column>`.

    Args:
        config: of the run.
        contents: fingerprints of what was read, see `run_folder.contents`.
    """
    known = dict(contents)
    versions: dict[str, Any] = {f"column/{column.name}": column.score.version for column in requested_columns(config)}
    versions["evidence"] = [[score.name, score.version] for score in evidence_scores(config)]
    for kind, what in KINDS.items():
        if what.stage == "embed" or not what.asked(config):
            continue  # `embed` names its objects by the model and the way pairs are read
        values = {key: attrgetter(key)(config) for key in what.reads}
        for key, target in instances(kind, config):
            parts = [known[name] for of in what.made_of for name in _dependencies(of, target, config, known)]
            known[key] = fingerprint(key, what.version, versions.get(key), values, parts)
    return {key: name for key, name in known.items() if key not in contents}


def instances(kind: str, config: Config) -> list[tuple[str, str]]:
    """The keys of a kind, each with its target. The target is empty for a key that belongs to none."""
    each = KINDS[kind].each
    if "target" in each:
        return [(f"{kind}/{target}", target) for target in config.targets]
    if "column" in each:
        return [(f"{kind}/{column.name}", column.target) for column in requested_columns(config)]
    return [(kind, "")]


def stages_of(config: Config) -> dict[str, list[str]]:
    """The keys of every stage that a configuration asks for, in the order of the recipe, without `embed` and `publish`."""
    stages = dict.fromkeys(what.stage for what in KINDS.values() if what.stage not in ("embed", "publish"))
    return {stage: keys for stage in stages if (keys := keys_of(stage, config))}


def keys_of(stage: str, config: Config) -> list[str]:
    """The keys of what a stage writes. They are asked for by what the stage itself depends on, and nothing else."""
    kinds = (kind for kind, what in KINDS.items() if what.stage == stage and what.asked(config))
    return [key for kind in kinds for key, _ in instances(kind, config)]


def each_shard(key: str) -> bool:
    """Whether there is one object of this key for every shard."""
    return "shard" in KINDS[key.partition("/")[0]].each


class Artifacts(NamedTuple):
    """Where the objects of a run are, after `embed`."""

    folder: str
    names: dict[str, str]  # see `names`
    shards: dict[str, str]  # fingerprint of the content of every shard that has usable pairs
    part: bool = False  # whether these are a few shards of many: their tables are asked for one by one, and not listed

    def url(self, key: str) -> str:
        """URL of an object of tensors."""
        return storage.join(self.folder, key, f"{self.names[key]}.safetensors")

    def tables(self, key: str) -> str:
        """Folder of the tables of all shards."""
        return storage.join(self.folder, key, self.names[key])

    def table(self, key: str, shard: str) -> str:
        """URL of the table of a shard, for the content that the shard has now."""
        return storage.join(self.tables(key), f"{shard}.{self.shards[shard]}.parquet")

    def listed(self, key: str) -> dict[str, storage.Object]:
        """The tables that exist, by shard. Tables of an earlier content of a shard are left out."""
        if self.part:
            found = storage.in_threads(storage.described, (self.table(key, shard) for shard in self.shards))
            return {shard: item for shard, item in zip(self.shards, found, strict=True) if item}
        there = {item.url.partition(f"/{self.names[key]}/")[2]: item for item in storage.listing(self.tables(key), ".parquet")}
        names = {shard: f"{shard}.{content}.parquet" for shard, content in self.shards.items()}
        return {shard: there[name] for shard, name in names.items() if name in there}


def _dependencies(of: str, target: str, config: Config, known: dict[str, str]) -> list[str]:
    """Keys of the objects of kind `of` that an object depends on.

    An object of a target depends on objects of that target alone. A kind that was not asked for has no keys.
    """
    if of in ("target", "question"):
        return [f"{of}/{target}"] if target else []
    if of in known or of not in KINDS:
        return [of]
    every = [key for key, _ in instances(of, config) if key in known]
    return [key for key in every if key == f"{of}/{target}"] if target else every


def _plain(value: Any) -> Any:
    if isinstance(value, OfKind):
        return value.question()  # its version counts, too
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"a {type(value).__name__} is no plain value: say what of it the object depends on")
