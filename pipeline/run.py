"""The recipe: the stages of a run, in order. Each writes whole objects and does only what is missing."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ecif import __version__
from ecif.targets import ENOUGH_COVERAGE
from pipeline import storage
from pipeline.config import Config
from pipeline.console import say
from pipeline.errors import RunError, UserError
from pipeline.inputs import Inputs, load_inputs
from pipeline.run_folder import tables
from pipeline.run_folder.artifacts import fingerprint
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.started import Plan, start_plan
from pipeline.stages.average import average
from pipeline.stages.embed.prompts import embed_prompts
from pipeline.stages.embed.stage import embed
from pipeline.stages.filter import choose_filter
from pipeline.stages.fit.sample import draw
from pipeline.stages.fit.stage import fit_heads
from pipeline.stages.forward.fit import fit_parameters
from pipeline.stages.forward.model import check
from pipeline.stages.forward.score import score_forward
from pipeline.stages.forward.solve import solve_forward
from pipeline.stages.index import IndexFolders, index
from pipeline.stages.score import Left, score
from pipeline.stages.solve.second_order import prepare
from pipeline.stages.solve.stage import Directions, solve
from pipeline.stages.solve.targets import Target, read_targets
from pipeline.storage.lease import hold
from pipeline.workers.cluster import Resources, session
from pipeline.workers.shards import written_shards


class Outcome(NamedTuple):
    """What a run did."""

    scores: str  # folder of the columns
    pairs: int  # in the corpus's tars
    scored: int
    quarantined: dict[str, int]  # by reason; pairs = scored + all of these
    lost: int  # pairs that a shard's _stats.json counts and its tar does not hold
    targets: dict[str, Any]  # per target: the damping chosen, its agreement with real refits (LDS), its coverage, its filter
    seconds: dict[str, float]  # wall time of each stage in this call
    seconds_a_pair: dict[str, float | None]  # of one actor: the model's forward pass, and all columns of it


class _Columns(NamedTuple):
    """What one checkpoint's stages left."""

    corpus: Dataset
    ids: dict[str, str]  # fingerprints
    targets: dict[str, Any]
    seconds: dict[str, float]
    seconds_a_pair: dict[str, float | None]


def run(config: Config, again: Sequence[str] = ()) -> Outcome:
    """Embed, fit, solve, filter, score, once for each checkpoint; on request, index and forward mode. The same call resumes.

    Args:
        config: of the run.
        again: accounting objects to forget as soon as the folder is held, so that their shards are read anew.

    Raises:
        UserError: a corpus, model or target that can't be had, or another run in the folder, before anything starts.
        RunError: a run that lost count of its pairs, or its folder to another run.
    """
    each = [config.model_copy(update={"model": model}) for model in config.model.each()]
    inputs = [load_inputs(one) for one in each]
    for one in each:
        check(one)
    with hold(config.run), session(config.workers) as resources:
        plan = start_plan(
            config,
            [
                {"features": one.corpus.fingerprint, "target_features": {n: d.fingerprint for n, d in one.targets.items()}}
                for one in inputs
            ],
        )
        for url in again:
            storage.delete(url)
        done = [_columns(plan, i, *one, resources) for i, one in enumerate(zip(each, inputs, strict=True))]
        columns = done[0] if len(done) == 1 else _mean(config, done)
        facts = {"config": config.model_dump(), "version": __version__, "targets": columns.targets, **columns.ids}
        storage.write_bytes(storage.join(config.run, "run.json"), tables.json_bytes(facts))
    scores = storage.join(config.run, "scores", columns.ids["scores"])
    return _account(columns.corpus, scores, columns.targets, columns.seconds, columns.seconds_a_pair)


def _columns(plan: Plan, at: int, config: Config, inputs: Inputs, resources: Resources) -> _Columns:
    """The stages with one checkpoint, the `at`-th of the plan."""
    model, corpus, clean = inputs
    started = [time.monotonic()]
    in_model = embed([corpus, *clean.values()], config.model, config.embed, model.preprocess, resources)
    embed_prompts(list(clean.values()), config.model, resources)
    for name, target in clean.items():
        if sum(a.embedded for a in target.accounting().values()) < 4:
            raise RunError(f"target {name}: fewer than four usable pairs, too little to ask; see its quarantine tables")
    started.append(time.monotonic())

    heads_id = fingerprint(corpus.content(), config.loss.question(), config.batch_size, config.seed, config.fit)
    plan.note(at, heads=heads_id)
    sample = draw(corpus, config)
    heads_url = _object(config, "heads", heads_id)
    fitted = fit_heads(heads_url, model.heads, sample, config, resources)
    started.append(time.monotonic())

    asked = {name: [d.content(), config.targets[name].question()] for name, d in clean.items()}
    directions_id = fingerprint(heads_id, asked, config.solve, config.score.negative, config.repeats)
    plan.note(at, directions=directions_id)
    targets = read_targets(clean, config)
    directions_url = _object(config, "directions", directions_id)
    directions = solve(directions_url, model.heads, fitted, sample, targets, config, resources)
    _warn(directions.facts)
    second_order_url = None
    if config.score.order == 2:
        second_order_url = _object(config, "second_order", fingerprint(directions_id, config.score.order_rank))
        prepare(second_order_url, fitted, directions, sample, targets, config, resources)
    started.append(time.monotonic())

    filter_id, filter_url = None, None
    if config.filter:
        filter_id = fingerprint(directions_id, config.filter)
        plan.note(at, filter=filter_id)
        filter_url = _object(config, "filter", filter_id)
        chosen = choose_filter(filter_url, model.heads, sample, directions, targets, config.filter, config, resources)
        for name, facts in chosen.facts.items():
            directions.facts[name]["filter"] = facts
    started.append(time.monotonic())

    scores_id = fingerprint(directions_id, filter_id, config.score, *_beside(corpus, config))
    plan.note(at, scores=scores_id)
    scores = storage.join(config.run, "scores", scores_id)
    in_score = score(scores, corpus, Left(heads_url, directions_url, filter_url, second_order_url), config, resources)
    started.append(time.monotonic())

    ids = {"features": corpus.fingerprint, "heads": heads_id, "directions": directions_id, "scores": scores_id}
    if config.index:
        ids["index"] = fingerprint(heads_id, config.index.rank, config.index.projection, config.score.negative)
        ids["self_influence"] = fingerprint(ids["index"], config.index.damping)
        folders = IndexFolders(*(storage.join(config.run, kind, ids[kind]) for kind in ("index", "self_influence")))
        index(folders, corpus, heads_url, sample, config, config.index, resources)
        started.append(time.monotonic())
    stages = ["embed", "fit", "solve", "filter", "score", *(["index"] if config.index else [])]
    columns = _Columns(corpus, ids, directions.facts, {}, {"forward_pass": in_model, "projection": in_score})
    if config.scoring.mode == "forward":
        columns = _forward(columns, directions, targets, clean, config, resources)
        plan.note(at, scores=columns.ids["scores"])
        stages.append("forward")
        started.append(time.monotonic())
    return columns._replace(seconds=dict(zip(stages, (b - a for a, b in pairwise(started)), strict=True)))


def _beside(corpus: Dataset, config: Config) -> list[Any]:
    """What columns carried from sidecars depend on: part of the tables, and of nothing before them."""
    if not (corpus.sidecars and config.corpus.sidecar):
        return []
    return [config.corpus.sidecar, [[name, item.size, item.etag] for name, item in sorted(corpus.sidecars.found.items())]]


def _forward(
    heads: _Columns,
    directions: Directions,
    targets: list[Target],
    clean: dict[str, Dataset],
    config: Config,
    resources: Resources,
) -> _Columns:
    """Influence on the chosen parameters instead of the heads, in a table of its own; the heads' columns stay."""
    scores_id = fingerprint(heads.ids["scores"], config.scoring)
    how = config.scoring.model_dump(include={"parameters", "sample", "epochs", "learning_rate"})
    fitted_id = fingerprint(heads.corpus.content(), config.batch_size, config.seed, how)
    chosen = fit_parameters(_object(config, "parameters", fitted_id), heads.corpus, config, resources)
    url = _object(config, "directions", scores_id)
    facts = solve_forward(url, chosen, heads.corpus, targets, clean, directions, config, resources)
    of_heads, scores = (storage.join(config.run, "scores", name) for name in (heads.ids["scores"], scores_id))
    in_forward = score_forward(scores, heads.corpus, of_heads, url, chosen, config, resources)
    return heads._replace(
        ids=heads.ids | {"scores": scores_id},
        targets={name: found | {"forward": facts[name]} for name, found in heads.targets.items()},
        seconds_a_pair=heads.seconds_a_pair | {"forward_mode": in_forward},
    )


def _mean(config: Config, each: list[_Columns]) -> _Columns:
    """The mean of the checkpoints' columns; everything else that has one value is the first's."""
    first = each[0]
    scores = fingerprint([one.ids["scores"] for one in each])
    folders = [storage.join(config.run, "scores", one.ids["scores"]) for one in each]
    average(storage.join(config.run, "scores", scores), folders, first.corpus)
    targets = {f"{name}, checkpoint {i}": facts for i, one in enumerate(each) for name, facts in one.targets.items()}
    seconds = {stage: sum(one.seconds[stage] for one in each) for stage in first.seconds}
    return first._replace(ids=first.ids | {"scores": scores}, targets=targets, seconds=seconds)


def load_run(folder: str) -> dict[str, Any]:
    """What `run` wrote about itself: its configuration, and which scores and features are its last.

    Raises:
        UserError: no finished run there.
    """
    try:
        return json.loads(storage.read_bytes(storage.join(folder, "run.json")))
    except FileNotFoundError:
        raise UserError(f"{folder}: no finished run there (no run.json)") from None


def _object(config: Config, kind: str, name: str) -> str:
    return storage.join(config.run, kind, f"{name}.safetensors")


def _warn(targets: dict[str, Any]) -> None:
    """Say which targets ask about too little of the corpus."""
    for name, facts in targets.items():
        if facts["coverage"] < ENOUGH_COVERAGE:
            say(
                f"warning: target {name} covers {facts['coverage']:.0%} of the corpus's concepts; below {ENOUGH_COVERAGE:.0%} "
                f"a filter by influence_{name} overfits it: give it more pairs, or filter by another column"
            )


def _account(corpus: Dataset, scores: str, targets: dict[str, Any], *seconds: dict[str, Any]) -> Outcome:
    """Every pair is scored or quarantined, or the run has failed."""
    done = corpus.accounting()
    there = written_shards(scores)
    pairs = sum(a.pairs for a in done.values())
    scored = sum(a.embedded for a in done.values() if a.shard in there)
    quarantined = Counter[str]()
    for a in done.values():
        quarantined.update(a.quarantined)
    if len(done) != len(corpus.shards) or pairs != scored + quarantined.total():
        raise RunError(f"{pairs} pairs, but {scored} scored and {quarantined.total()} quarantined: the run lost count")
    lost = sum(a.lost for a in done.values())
    return Outcome(scores, pairs, scored, dict(sorted(quarantined.items())), lost, targets, *seconds)
