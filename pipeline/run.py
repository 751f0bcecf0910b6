"""The recipe: the stages of a run, in order. Each writes whole objects and does only what is missing."""

import json
import time
from collections import Counter
from itertools import pairwise
from typing import Any, NamedTuple

from ecif import __version__
from pipeline import storage, tables
from pipeline.cluster import session
from pipeline.config import Config
from pipeline.dataset import Dataset
from pipeline.embed import embed
from pipeline.errors import RunError, UserError
from pipeline.fit import fit_heads
from pipeline.inputs import fingerprint, load_inputs
from pipeline.sample import draw, read_all
from pipeline.score import score, scored_shards
from pipeline.solve import Target, solve


class Outcome(NamedTuple):
    """What a run did."""

    scores: str  # folder of the columns
    pairs: int  # in the corpus's tars
    scored: int
    quarantined: dict[str, int]  # by reason; pairs = scored + all of these
    targets: dict[str, Any]  # per target: the damping chosen, and its agreement with real refits (LDS)
    seconds: dict[str, float]  # wall time of each stage in this call
    seconds_a_pair: dict[str, float | None]  # of one actor: the model's forward pass, and the projection on all directions


def run(config: Config) -> Outcome:
    """Embed, fit, solve, score; the same call resumes.

    Raises:
        UserError: a corpus, model or target that can't be had, before anything starts.
        RunError: a run that lost count of its pairs.
    """
    model, corpus, clean = load_inputs(config)
    with session(config.workers) as resources:
        started = [time.monotonic()]
        in_model = embed([corpus, *clean.values()], config.model, config.embed, model.preprocess, resources)
        for name, target in clean.items():
            if sum(a.embedded for a in target.accounting().values()) < 2:
                raise RunError(f"target {name}: fewer than two usable pairs, nothing to improve; see its quarantine tables")
        started.append(time.monotonic())

        heads_id = fingerprint(corpus.content(), config.batch_size, config.seed, config.fit)
        sample = draw(corpus, config)
        heads_url = _object(config, "heads", heads_id)
        fitted = fit_heads(heads_url, model.heads, sample, config, resources)
        started.append(time.monotonic())

        directions_id = fingerprint(heads_id, {name: d.content() for name, d in clean.items()}, config.solve, config.score)
        targets = [Target(name, *read_all(d)) for name, d in clean.items()]
        directions_url = _object(config, "directions", directions_id)
        directions = solve(directions_url, model.heads, fitted, sample, targets, config, resources)
        started.append(time.monotonic())

        scores = storage.join(config.run, "scores", directions_id)
        in_score = score(scores, corpus, heads_url, directions_url, config, resources)
        started.append(time.monotonic())

    seconds = dict(zip(("embed", "fit", "solve", "score"), (b - a for a, b in pairwise(started)), strict=True))
    ids = {"features": corpus.fingerprint, "heads": heads_id, "directions": directions_id, "scores": directions_id}
    facts = {"config": config.model_dump(), "version": __version__, "targets": directions.facts, **ids}
    storage.write_bytes(storage.join(config.run, "run.json"), tables.json_bytes(facts))
    return _account(corpus, scores, directions.facts, seconds, {"forward_pass": in_model, "projection": in_score})


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


def _account(corpus: Dataset, scores: str, targets: dict[str, Any], *seconds: dict[str, Any]) -> Outcome:
    """Every pair is scored or quarantined, or the run has failed."""
    done = corpus.accounting()
    there = scored_shards(scores)
    pairs = sum(a.pairs for a in done.values())
    scored = sum(a.embedded for a in done.values() if a.shard in there)
    quarantined = Counter[str]()
    for a in done.values():
        quarantined.update(a.quarantined)
    if len(done) != len(corpus.shards) or pairs != scored + quarantined.total():
        raise RunError(f"{pairs} pairs, but {scored} scored and {quarantined.total()} quarantined: the run lost count")
    return Outcome(scores, pairs, scored, dict(sorted(quarantined.items())), targets, *seconds)
